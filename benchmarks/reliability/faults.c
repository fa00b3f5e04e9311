// An LD_PRELOAD library that counts what a process does to the files under a folder, and at the n-th operation
// kills it with SIGKILL or lets the operation fail. faults.py compiles it and says what is armed.
//
// Counted: open for writing, mkdir, write, pwrite, writev, ftruncate, chmod, fsync, fdatasync, rename, unlink, rmdir,
// in all their forms that go through libc. Not seen: Rust's rustix calls the kernel itself for the rename that
// safetensors ends with; the operations before and after it are counted, so both of its sides are.

#undef _FORTIFY_SOURCE  // it makes open() an inline function
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

// What happens at the n-th operation. HALF: of a write the first half is written, then SIGKILL.
enum { OFF, LOG, BEFORE, HALF, AFTER, FAIL };

static int mode = OFF, code, sticky, log_to = -1;
static long counter, at;
static char root[PATH_MAX];

// Arms the library for the operations under `folder`, counted from 1. error: the errno of FAIL; all_later: whether
// every later operation fails too. descriptor: each operation is written there as a line, -1 for none.
void faults_arm(const char *folder, int what, long n, int error, int all_later, int descriptor) {
    snprintf(root, sizeof root, "%s", folder);
    counter = 0, at = n, code = error, sticky = all_later, log_to = descriptor, mode = what;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int under_root(const char *path) {
    size_t n = strlen(root);
    return strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == 0);
}

static void path_of(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
}

// The absolute path of `path` at the folder `fd`.
static void absolute(int fd, const char *path, char *out) {
    char folder[PATH_MAX];
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (fd == AT_FDCWD) {
        if (!getcwd(folder, sizeof folder)) folder[0] = 0;
    } else {
        path_of(fd, folder);
    }
    if (snprintf(out, PATH_MAX, "%s/%s", folder, path) >= PATH_MAX) out[0] = 0;
}

// Counts an operation; kills, or returns what is still to be done about it: FAIL (errno is set), HALF, AFTER or OFF.
static int begin(const char *op, int fd, const char *path, const char *target, size_t bytes) {
    if (mode == OFF || !under_root(path)) return OFF;
    long n = __sync_add_and_fetch(&counter, 1);
    if (log_to >= 0) {
        struct stat s;
        memset(&s, 0, sizeof s);
        if (fd >= 0) fstat(fd, &s);
        dprintf(log_to, "%s\t%lu\t%s\t%s\t%zu\n", op, (unsigned long)s.st_ino, path, target, bytes);
    }
    if (mode == FAIL && (n == at || (sticky && n > at))) {
        errno = code;
        return FAIL;
    }
    if (mode == BEFORE && n == at) die();
    return n == at && (mode == HALF || mode == AFTER) ? mode : OFF;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
// The operation itself, between what begin() said and what comes after.
#define DO(call)                          \
    do {                                  \
        if (what == FAIL) return -1;      \
        if (what == HALF) die();          \
        __typeof__(call) result = (call); \
        if (what == AFTER) die();         \
        return result;                    \
    } while (0)

static int begin_at(const char *op, int fd, const char *path, const char *target) {
    char whole[PATH_MAX];
    if (mode == OFF) return OFF;
    absolute(fd, path, whole);
    return begin(op, -1, whole, target, 0);
}

static int begin_fd(const char *op, int fd, size_t bytes) {
    char whole[PATH_MAX];
    if (mode == OFF) return OFF;
    path_of(fd, whole);
    return begin(op, fd, whole, "", bytes);
}

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define OPEN(name)                                                             \
    int name(const char *path, int flags, ...) {                               \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                          \
        REAL(name);                                                            \
        int what = WRITES(flags) ? begin_at("open", AT_FDCWD, path, "") : OFF; \
        DO(real(path, flags, bits));                                           \
    }
#define OPENAT(name)                                                           \
    int name(int fd, const char *path, int flags, ...) {                       \
        va_list more;                                                          \
        va_start(more, flags);                                                 \
        mode_t bits = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                          \
        REAL(name);                                                            \
        int what = WRITES(flags) ? begin_at("open", fd, path, "") : OFF;       \
        DO(real(fd, path, flags, bits));                                       \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t bits) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, bits); }
int creat64(const char *path, mode_t bits) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, bits); }

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    int what = begin_fd("write", fd, n);
    if (what == HALF && real(fd, data, n / 2) >= 0) die();
    DO(real(fd, data, n));
}

#define PWRITE(name, offset_type)                                     \
    ssize_t name(int fd, const void *data, size_t n, offset_type o) { \
        REAL(name);                                                   \
        int what = begin_fd("write", fd, n);                          \
        if (what == HALF && real(fd, data, n / 2, o) >= 0) die();     \
        DO(real(fd, data, n, o));                                     \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    size_t bytes = 0;
    for (int i = 0; i < n; i++) bytes += parts[i].iov_len;
    int what = begin_fd("write", fd, bytes);
    if (what == HALF && real(fd, parts, n / 2) >= 0) die();
    DO(real(fd, parts, n));
}

#define ON_DESCRIPTOR(op, name, parameters, ...) \
    int name parameters {                        \
        REAL(name);                              \
        int what = begin_fd(op, fd, 0);          \
        DO(real(__VA_ARGS__));                   \
    }
ON_DESCRIPTOR("fsync", fsync, (int fd), fd)
ON_DESCRIPTOR("fsync", fdatasync, (int fd), fd)
ON_DESCRIPTOR("write", ftruncate, (int fd, off_t n), fd, n)
ON_DESCRIPTOR("write", ftruncate64, (int fd, off64_t n), fd, n)
ON_DESCRIPTOR("chmod", fchmod, (int fd, mode_t bits), fd, bits)

#define ON_PATH(op, name, at_fd, parameters, ...)   \
    int name parameters {                           \
        REAL(name);                                 \
        int what = begin_at(op, at_fd, path, "");   \
        DO(real(__VA_ARGS__));                      \
    }
ON_PATH("chmod", chmod, AT_FDCWD, (const char *path, mode_t bits), path, bits)
ON_PATH("chmod", fchmodat, fd, (int fd, const char *path, mode_t bits, int flags), fd, path, bits, flags)
ON_PATH("mkdir", mkdir, AT_FDCWD, (const char *path, mode_t bits), path, bits)
ON_PATH("mkdir", mkdirat, fd, (int fd, const char *path, mode_t bits), fd, path, bits)
ON_PATH("rmdir", rmdir, AT_FDCWD, (const char *path), path)
ON_PATH("unlink", unlink, AT_FDCWD, (const char *path), path)
ON_PATH("unlink", unlinkat, fd, (int fd, const char *path, int flags), fd, path, flags)

int rename(const char *from, const char *to) {
    REAL(rename);
    char target[PATH_MAX];
    absolute(AT_FDCWD, to, target);
    int what = begin_at("rename", AT_FDCWD, from, target);
    DO(real(from, to));
}

int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    REAL(renameat);
    char target[PATH_MAX];
    absolute(to_fd, to, target);
    int what = begin_at("rename", from_fd, from, target);
    DO(real(from_fd, from, to_fd, to));
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    REAL(renameat2);
    char target[PATH_MAX];
    absolute(to_fd, to, target);
    int what = begin_at(flags ? "exchange" : "rename", from_fd, from, target);
    DO(real(from_fd, from, to_fd, to, flags));
}
