"""What a checkpoint survives: processes killed, disks full or broken, at moments drawn by chance and at every one."""
