// The threads of native_step.cpp: one loop at a time, shared by the caller and workers that sleep in between.
//
// The caller never waits for a worker that has not begun: on a busy machine it does the work of a worker that gets no
// time. (OpenMP waits for all threads in every loop; with another program on one of two cores a step took seconds.)

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace threads {

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

constexpr int SPINS = 2000;  // looks before a thread sleeps: some 50 microseconds

struct Workers {
  // What a loop does: run(context, first, last). Written while the loop is closed and no worker is inside.
  void (*run)(const void* context, int64_t first, int64_t last) = nullptr;
  const void* context = nullptr;
  int64_t count = 0, chunk = 1;

  std::atomic<int> allowed{0};  // workers that may take part
  std::atomic<int64_t> next{0};
  std::atomic<bool> open{false};
  std::atomic<bool> waiting{false};  // whether the caller sleeps until nobody is inside
  std::atomic<int> inside{0}, sleeping{0};
  std::mutex one_loop, sleep;
  std::condition_variable wake, left;
  int num = 0;  // workers that have been started

  void take() {
    for (;;) {
      const int64_t first = next.fetch_add(chunk, std::memory_order_relaxed);
      if (first >= count) return;
      run(context, first, std::min(first + chunk, count));
    }
  }

  void work(int number) {
    for (int spins = 0;; spins++) {
      if (open && number < allowed) {
        inside++;  // before the second look: the caller closes the loop first, and then waits for those inside
        if (open && number < allowed) take(), spins = 0;
        if (--inside == 0 && waiting) {
          { std::lock_guard<std::mutex> lock(sleep); }
          left.notify_one();
        }
      }
      pause();
      if (spins < SPINS) continue;
      std::unique_lock<std::mutex> lock(sleep);
      sleeping++;
      wake.wait(lock, [&] { return open && number < allowed; });
      sleeping--;
      spins = 0;
    }
  }

  void loop(int wanted) {
    for (; num < wanted - 1; num++) std::thread([this, number = num] { work(number); }).detach();
    open = true;
    if (sleeping) {
      { std::lock_guard<std::mutex> lock(sleep); }  // one that has looked, and does not sleep yet
      wake.notify_all();
    }
    take();
    open = false;
    for (int spins = 0; inside && spins < SPINS; spins++) pause();
    if (!inside) return;
    std::unique_lock<std::mutex> lock(sleep);  // a worker lost its processor: leave it ours
    waiting = true;
    left.wait(lock, [&] { return inside == 0; });
    waiting = false;
  }
};

inline Workers& workers() {
  static Workers* const all = new Workers;  // never deleted: they sleep until the process ends
  return *all;
}

// body(i) for i from 0 to count, in any order, by at most `num` threads. Another loop at the same time: by the caller
// alone.
template <typename F>
void for_each(int64_t count, int num, const F& body) {
  Workers& all = workers();
  std::unique_lock<std::mutex> lock(all.one_loop, std::defer_lock);
  if (num <= 1 || count <= 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
  all.run = [](const void* context, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) (*static_cast<const F*>(context))(i);
  };
  all.context = &body, all.count = count, all.next = 0, all.allowed = num - 1;
  all.chunk = std::max<int64_t>(1, count / (8 * num));
  all.loop(num);
}

}  // namespace threads
