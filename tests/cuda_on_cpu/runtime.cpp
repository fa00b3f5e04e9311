// Runs the blocks of a kernel one after the other, each with its threads as fibers that take turns where they wait for
// one another. A fiber whose thread ends takes the next thread, so that a kernel that never waits is a plain loop.
//
// Strict where a GPU is undefined: a barrier that not all threads reach, a shuffle that a lane of the mask stays away
// from, a misaligned pointer (by UBSan's calls, compiled in with -fsanitize=alignment) are errors. Threads and blocks
// can run in descending order, so that a result that hangs on the order shows.
#include <cuda_runtime.h>
#include <ucontext.h>

#include <mutex>
#include <string>
#include <vector>

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 256 * 1024;

enum class State { fresh, running, at_block, at_warp, at_cluster, stopped, done };

struct Thread {
  dim3 index, block;
  int rank = 0;  // of its block in the cluster
  State state = State::fresh;
  int fiber = -1, exchanges = 0, arrivals = 0;
  unsigned mask = 0;
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStack]};  // not filled: most of it is never touched
};

bool descending = false;
std::mutex mutex;  // one kernel at a time
std::string problem;
std::vector<Thread> threads;  // of a block, or of all blocks of a cluster
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<int> idle;  // fibers without a thread
std::vector<uint64_t> slots[2];
std::vector<char> shared;
size_t shared_stride;  // from one block's to the next one's
ucontext_t scheduler;
const std::function<void()>* body;
int current, next;  // threads, by their place in `threads`; next is the first that has not begun

void enter(int thread) {
  current = thread;
  threads[thread].state = State::running;
  threadIdx = threads[thread].index;
  blockIdx = threads[thread].block;
}

int in_order(int i) { return descending ? static_cast<int>(threads.size()) - 1 - i : i; }

void fiber_main(int fiber) {
  for (;;) {
    while (next < static_cast<int>(threads.size())) {
      enter(in_order(next++));
      threads[current].fiber = fiber;
      (*body)();
      threads[current].state = State::done;
    }
    idle.push_back(fiber);
    swapcontext(&fibers[fiber]->context, &scheduler);
  }
}

void wait(State state) {
  const int thread = current, fiber = threads[thread].fiber;
  threads[thread].state = state;
  swapcontext(&fibers[fiber]->context, &scheduler);
}

void begin_threads() {
  while (next < static_cast<int>(threads.size()) && problem.empty()) {
    if (idle.empty()) {
      const int fiber = static_cast<int>(fibers.size());
      fibers.push_back(std::make_unique<Fiber>());
      auto& made = *fibers.back();
      getcontext(&made.context);
      made.context.uc_stack = {made.stack.get(), 0, kStack};
      makecontext(&made.context, reinterpret_cast<void (*)()>(fiber_main), 1, fiber);
      idle.push_back(fiber);
    }
    const int fiber = idle.back();
    idle.pop_back();
    swapcontext(&scheduler, &fibers[fiber]->context);
  }
}

void resume(const std::vector<int>& released) {
  for (const int thread : released) {
    if (!problem.empty()) return;
    enter(thread);
    swapcontext(&scheduler, &fibers[threads[thread].fiber]->context);
  }
}

// The threads that may go on: a warp whose exchange is complete, or else a whole block, or those that wait for a
// cluster whose other threads have arrived as often; none where all are stuck.
std::vector<int> released() {
  const int count = static_cast<int>(threads.size());
  std::vector<int> found;
  for (int warp = 0; warp < count; warp += 32) {
    bool complete = false;
    for (int t = warp; t < std::min(warp + 32, count); ++t) {
      if (threads[t].state != State::at_warp) continue;
      complete = true;
      for (int l = 0; l < 32 && complete; ++l) {
        if ((threads[t].mask >> l & 1) == 0) continue;
        complete = warp + l < count && threads[warp + l].state == State::at_warp &&
                   threads[warp + l].mask == threads[t].mask;
      }
      if (!complete) break;
    }
    if (complete)
      for (int t = warp; t < std::min(warp + 32, count); ++t)
        if (threads[t].state == State::at_warp) found.push_back(t);
  }
  const int size = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  for (int first = 0; found.empty() && first < count; first += size) {
    const auto begin = threads.begin() + first;
    if (std::all_of(begin, begin + size, [](auto& t) { return t.state == State::at_block; }))
      for (int t = first; t < first + size; ++t) found.push_back(t);
  }
  if (found.empty()) {
    const auto least = [](auto& a, auto& b) { return a.arrivals < b.arrivals; };
    const int arrivals = std::min_element(threads.begin(), threads.end(), least)->arrivals;
    for (int t = 0; t < count; ++t)
      if (threads[t].state == State::at_cluster && threads[t].arrivals <= arrivals) found.push_back(t);
  }
  if (descending) std::reverse(found.begin(), found.end());
  return found;
}

void run_block() {
  for (auto& thread : threads) thread.state = State::fresh, thread.exchanges = thread.arrivals = 0;
  next = 0;
  begin_threads();
  while (std::any_of(threads.begin(), threads.end(), [](auto& t) { return t.state != State::done; })) {
    const auto free = released();
    if (free.empty() && problem.empty()) problem = "some threads of a block wait where others never come";
    if (!problem.empty()) {
      fibers.clear(), idle.clear();
      return;
    }
    resume(free);
  }
}

}  // namespace

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread, unsigned cluster) {
  const std::lock_guard lock(mutex);
  STD_TORCH_CHECK(grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 && grid.y < 65536 && grid.z > 0 && grid.z < 65536,
                  "grid of ", grid.x, " x ", grid.y, " x ", grid.z);
  const unsigned size = block.x * block.y * block.z;
  STD_TORCH_CHECK(size > 0 && size <= 1024 && shared_bytes <= 227 * 1024, "block of ", size, ", ", shared_bytes);
  STD_TORCH_CHECK(cluster > 0 && grid.x % cluster == 0 && (cluster == 1 || size % 32 == 0), "clusters of ", cluster);
  problem.clear();
  blockDim = block, gridDim = grid;
  body = &thread;
  threads.assign(size * cluster, {});
  for (unsigned t = 0; t < size * cluster; ++t) {
    const unsigned i = t % size;
    threads[t].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    threads[t].rank = static_cast<int>(t / size);
  }
  for (auto& slot : slots) slot.assign((threads.size() + 31) / 32 * 32, 0);
  shared_stride = (shared_bytes + 15) / 16 * 16;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z / cluster;
  for (uint64_t i = 0; i < blocks && problem.empty(); ++i) {
    const uint64_t b = descending ? blocks - 1 - i : i;
    for (auto& t : threads) {
      const uint64_t at = b * cluster + static_cast<unsigned>(t.rank);
      t.block = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                 static_cast<unsigned>(at / grid.x / grid.y)};
    }
    shared.assign(shared_stride * cluster + 16, static_cast<char>(0xFF));  // NaN: nothing lies there yet
    run_block();
  }
  STD_TORCH_CHECK(problem.empty(), problem);
}

void* shared_memory() {
  const auto base = (reinterpret_cast<uintptr_t>(shared.data()) + 15) / 16 * 16;
  return reinterpret_cast<void*>(base + static_cast<size_t>(threads[current].rank) * shared_stride);
}

const void* shared_of_rank(const void* p, int rank) {
  if (rank < 0 || rank > threads.back().rank) problem = "a block's rank outside of the cluster";
  return static_cast<const char*>(p) + (rank - threads[current].rank) * static_cast<ptrdiff_t>(shared_stride);
}

void arrive_at_cluster() { ++threads[current].arrivals; }
void wait_for_cluster() { wait(State::at_cluster); }

void wait_for_block() { wait(State::at_block); }

int lane() { return current % 32; }

uint64_t exchange(unsigned mask, uint64_t bits, int from) {
  auto& thread = threads[current];
  if ((mask >> from & 1) == 0 || (mask >> lane() & 1) == 0) problem = "a shuffle with a lane outside of its mask";
  auto& slot = slots[thread.exchanges++ % 2];  // two: who is quick may be at the next exchange already
  const int warp = current / 32 * 32;
  slot[current] = bits;
  thread.mask = mask;
  wait(State::at_warp);
  return slot[warp + from];
}

}  // namespace cuda_on_cpu

// What -fsanitize=alignment calls. It does not return: the access would be a fault.
extern "C" __attribute__((visibility("default"))) void __ubsan_handle_type_mismatch_v1(void*, uintptr_t pointer) {
  using namespace cuda_on_cpu;
  problem = "misaligned access to address " + std::to_string(pointer);
  wait(State::stopped);
}

namespace {
void run_descending(bool on) { cuda_on_cpu::descending = on; }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastgen_cuda_on_cpu, m) { m.def("run_descending(bool on) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda_on_cpu, CompositeExplicitAutograd, m) {
  m.impl("run_descending", TORCH_BOX(&run_descending));
}
