// csrc/cuda/device.h for a machine without a GPU: the threads of a cluster are fibers that take turns on one CPU.
//
// A fiber runs until it has to wait for others. The next fiber is chosen at random, and a bulk copy arrives at a random
// later time, or when no fiber can go on: an order that only happens to work does not always happen. Where no fiber can
// go on and no bulk copy is under way, the cluster would hang, and an exception says so. Shared memory is filled with
// NaN, so that a read past what was copied shows.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

// Bytes of device memory read and written since the last look; what lies in shared memory does not count.
struct Traffic {
  int64_t bytes[2] = {};
  const char *first = nullptr, *last = nullptr;  // shared memory

  // Whether the access is to shared memory.
  bool see(const void* memory, int64_t count, bool writes) {
    const char* at = static_cast<const char*>(memory);
    if (at >= first && at < last) return true;
    bytes[writes] += count;
    return false;
  }
};

inline Traffic traffic;
inline void trace_access(const void* memory, int64_t bytes, bool writes);
#define FASTKD_TRACE_ACCESS(memory, bytes, writes) trace_access(memory, bytes, writes)
#define FASTKD_DEVICE inline
#define FASTKD_KERNEL(most_threads) void
#define FASTKD_PARAMETER

namespace fastkd::cuda {

struct Barrier {
  int phase, pending;
  int64_t bytes;
};

namespace host {

constexpr int LANES = 32, SLOT = 128;  // bytes that a lane passes on at once, at most
constexpr size_t STACK = 128 << 10;

using Queue = std::vector<int>;  // fibers that wait for the same thing

struct Meeting {  // of a number of fibers, again and again
  int arrived = 0;
  unsigned generation = 0;
  Queue waiting;
};

struct Warp : Meeting {
  alignas(16) char slots[2][LANES][SLOT];
};

struct Fiber {
  std::unique_ptr<char, void (*)(char*)> stack{nullptr, nullptr};
  ucontext_t start;
  jmp_buf place;
  bool started = false, done = false;
  unsigned cluster_generation = 0;
};

struct Copy {
  char* to;
  const char* from;
  int64_t bytes;
  Barrier* barrier;
};

class Machine {
 public:
  int64_t cluster = 0, clusters = 1;
  int ranks = 1, threads = 32;

  int fiber() const { return current_; }
  int rank() const { return current_ / threads; }
  char* memory(int rank) { return memory_.data() + rank * room_; }

  // body(shared memory) in every thread of a cluster.
  void run(int64_t room, const std::function<void(char*)>& body) {
    room_ = (room + 127) / 128 * 128;
    memory_.assign(room_ * ranks + 128, char(0xff));
    touched_.assign(memory_.size(), {0, NOBODY, NOBODY});
    traffic.first = memory_.data(), traffic.last = traffic.first + memory_.size();
    const int count = ranks * threads;
    while (int(fibers_.size()) < count) fibers_.push_back(std::make_unique<Fiber>());
    blocks_.assign(ranks, {});
    warps_.clear();
    warps_.resize(count / LANES);
    cluster_ = {};
    body_ = &body;
    runnable_.clear();
    for (int i = 0; i < count; ++i) {
      fibers_[i]->started = fibers_[i]->done = false;
      runnable_.push_back(i);
    }
    for (;;) {
      if (!copies_.empty() && (runnable_.empty() || draw(64) == 0)) {
        complete(draw(copies_.size()));
      } else if (!runnable_.empty()) {
        resume(take(runnable_, draw(runnable_.size())));
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      } else {
        break;
      }
    }
    for (int i = 0; i < count; ++i)
      if (!fibers_[i]->done) throw std::runtime_error("thread " + std::to_string(i) + " of a cluster waits for ever");
  }

  void meet(Meeting& meeting, int count) {
    const unsigned generation = meeting.generation;
    arrive(meeting, count);
    while (meeting.generation == generation) park(meeting.waiting);
  }
  void sync_block() { meet(blocks_[rank()], threads); }
  void sync_warp() { meet(warps_[current_ / LANES], LANES); }
  void cluster_arrive() {
    fibers_[current_]->cluster_generation = cluster_.generation;
    arrive(cluster_, ranks * threads);
  }
  void cluster_wait() {
    while (cluster_.generation == fibers_[current_]->cluster_generation) park(cluster_.waiting);
  }

  // An access to logits or gradients in shared memory. Two fibers race for a byte if one writes it, and no barrier of
  // the block is between the two accesses.
  void touch(const char* at, int64_t count, bool writes) {
    const unsigned epoch = blocks_[rank()].generation + cluster_.generation + 1;
    for (int64_t i = at - memory_.data(); count-- > 0; ++i) {
      Touched& byte = touched_[i];
      if (byte.epoch != epoch) byte = {epoch, NOBODY, NOBODY};
      const auto another = [&](int fiber) { return fiber != NOBODY && fiber != current_; };
      if (another(byte.writer) || (writes && another(byte.reader)))
        throw std::runtime_error("two threads race for byte " + std::to_string(i) + " of shared memory");
      int& mine = writes ? byte.writer : byte.reader;
      mine = another(mine) ? SEVERAL : current_;
    }
  }

  // What a lane of this warp has, when all lanes have come.
  void exchange(void* value, size_t bytes, int lane) {
    Warp& warp = warps_[current_ / LANES];
    auto& slots = warp.slots[warp.generation & 1];  // lanes that are ahead write into the others
    std::memcpy(slots[current_ % LANES], value, bytes);
    meet(warp, LANES);
    std::memcpy(value, slots[lane < LANES ? lane : current_ % LANES], bytes);
  }

  void request(const Copy& copy) {
    for (const uintptr_t number : {uintptr_t(copy.to), uintptr_t(copy.from), uintptr_t(copy.bytes)})
      if (number % 16) throw std::runtime_error("bulk copies move whole pieces only");
    copies_.push_back(copy);
  }
  void settle(Barrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.phase ^= 1;
    barrier.pending = 1;
    wake(barriers_[&barrier]);
  }
  void wait(Barrier& barrier, int parity) {
    while (barrier.phase == parity) park(barriers_[&barrier]);
  }

 private:
  size_t draw(size_t below) {  // a number below that one
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return size_t((state_ >> 33) % below);
  }
  template <class T>
  static T take(std::vector<T>& from, size_t place) {
    std::swap(from[place], from.back());
    const T taken = from.back();
    from.pop_back();
    return taken;
  }
  void arrive(Meeting& meeting, int count) {
    if (++meeting.arrived < count) return;
    meeting.arrived = 0;
    ++meeting.generation;
    wake(meeting.waiting);
  }
  void wake(Queue& queue) {
    runnable_.insert(runnable_.end(), queue.begin(), queue.end());
    queue.clear();
  }
  void complete(size_t place) {
    const Copy copy = take(copies_, place);
    traffic.see(copy.from, copy.bytes, false);
    std::memcpy(copy.to, copy.from, copy.bytes);
    copy.barrier->bytes -= copy.bytes;
    settle(*copy.barrier);
  }

  // Between the scheduler in run() and a fiber.
  void park(Queue& queue) {
    queue.push_back(current_);
    if (!_setjmp(fibers_[current_]->place)) _longjmp(scheduler_, 1);
  }
  void resume(int number) {
    current_ = number;
    Fiber& fiber = *fibers_[number];
    if (_setjmp(scheduler_)) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    if (!fiber.stack) {
      void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
      fiber.stack = {static_cast<char*>(stack), [](char* memory) { munmap(memory, STACK); }};
    }
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, enter, 0);
    setcontext(&fiber.start);
  }
  static void enter();

  static constexpr int NOBODY = -1, SEVERAL = -2;
  struct Touched {
    unsigned epoch;
    int writer, reader;  // since the epoch began
  };

  std::vector<char> memory_;
  std::vector<Touched> touched_;  // by byte of memory_
  int64_t room_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> blocks_;
  std::vector<Warp> warps_;
  Meeting cluster_;
  std::map<const Barrier*, Queue> barriers_;
  std::vector<Copy> copies_;
  std::vector<int> runnable_;
  const std::function<void(char*)>* body_ = nullptr;
  std::exception_ptr error_;
  jmp_buf scheduler_;
  int current_ = 0;
  uint64_t state_ = 1;
};

inline Machine machine;

inline void Machine::enter() {
  try {
    (*machine.body_)(machine.memory(machine.rank()));
  } catch (...) {
    machine.error_ = std::current_exception();
  }
  machine.fibers_[machine.current_]->done = true;
  _longjmp(machine.scheduler_, 1);
}

}  // namespace host
}  // namespace fastkd::cuda

inline void trace_access(const void* memory, int64_t bytes, bool writes) {
  if (traffic.see(memory, bytes, writes))
    fastkd::cuda::host::machine.touch(static_cast<const char*>(memory), bytes, writes);
}

namespace fastkd::cuda {

inline int64_t block_number() { return host::machine.cluster * host::machine.ranks + host::machine.rank(); }
inline int64_t block_count() { return host::machine.clusters * host::machine.ranks; }
inline int thread_number() { return host::machine.fiber() % host::machine.threads; }

inline char* shared_memory() { return host::machine.memory(host::machine.rank()); }

inline void sync_block() { host::machine.sync_block(); }
inline void sync_warp() { host::machine.sync_warp(); }
inline void cluster_arrive(bool = true) { host::machine.cluster_arrive(); }
inline void cluster_wait() { host::machine.cluster_wait(); }

template <class Part>
Part from_lane_above(Part part, int step) {
  static_assert(sizeof(Part) <= host::SLOT, "a lane passes on less at once");
  host::machine.exchange(&part, sizeof(Part), host::machine.fiber() % host::LANES + step);
  return part;
}
template <class Part>
Part from_first_lane(Part part) {
  host::machine.exchange(&part, sizeof(Part), 0);
  return part;
}
template <class Part>
void send(Part* place, int rank, const Part& value) {
  const char* mine = host::machine.memory(host::machine.rank());
  std::memcpy(host::machine.memory(rank) + (reinterpret_cast<char*>(place) - mine), &value, sizeof(Part));
}
inline uint32_t set_bits(uint32_t* word, uint32_t bits) {
  const uint32_t before = *word;
  *word |= bits;
  return before;
}

inline void init(Barrier* barrier) { *barrier = {0, 1, 0}; }
inline void expect(Barrier* barrier, int64_t bytes) {
  barrier->bytes += bytes;
  --barrier->pending;
  host::machine.settle(*barrier);
}
inline void copy_pieces(char* to, const char* from, int64_t bytes, Barrier* barrier) {
  host::machine.request({to, from, bytes, barrier});
}
inline void wait(Barrier* barrier, int parity) { host::machine.wait(*barrier, parity); }
inline void order_before_copies() {}

}  // namespace fastkd::cuda
