// What the CUDA kernels ask of a GPU, on a CPU: a GPU's thread is a fiber that runs until its block or warp has to meet, and
// then lets the others run up to there. Blocks run one after the other, so what is __shared__ may be static. Fibers take
// turns in ascending or descending order (`set_descending`): of a barrier that is missing, one of the two shows the lack.
// tests/cuda_on_cpu.py puts the kernels behind it in place of their PTX. Products are summed in float64: a tensor core's
// own rounding is not imitated. A context begins a fiber's stack and jumps change between them, for a change of context asks
// the system to change nothing about signals. Headers are few, as each library compiles them again.
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct Index { int x, y; };
struct Barrier {
  int size, here = 0, round = 0;
  void arrive_and_wait();
};
struct Warp {
  Barrier meet{32};
  uint32_t a[32][6];
  uint64_t one[32];
};
struct Block {
  Block(int threads, size_t bytes) : meet{threads}, warp(threads / 32), shared(bytes, 0xff) {}
  Barrier meet;
  std::vector<Warp> warp;
  std::vector<uint8_t> shared, of_kernel = std::vector<uint8_t>(1 << 16, 0xff);  // poisoned; without and with a type
  template <typename T> T& fixed() { return *reinterpret_cast<T*>(of_kernel.data()); }
};
struct Copy { uint32_t to; const void* from; };
struct Fiber {
  jmp_buf at;
  std::vector<char> stack = std::vector<char>(1 << 16);
  bool begun = false, done = true;      // begun once: every block runs on the same stacks
  const Barrier* waits = nullptr;       // for whose round to be another than
  int round;
  std::vector<Copy> open;               // asynchronous copies, which are made as late as they may be
  std::vector<std::vector<Copy>> groups;
};
inline Index threadIdx, blockIdx;
inline int thread_id;  // in its block
inline Block* block;
inline bool descending = false;
extern "C" inline __attribute__((used)) void set_descending(int yes) { descending = yes != 0; }
inline uint8_t* shared_base() { return block->shared.data(); }
inline Warp& warp_() { return block->warp[thread_id / 32]; }
inline int lane_() { return thread_id & 31; }
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline void (*body)(const void*);
inline const void* kernel_;
__attribute__((noinline)) inline void change(jmp_buf& from, jmp_buf& to) {
  if (!_setjmp(from)) _longjmp(to, 1);
}
inline void yield_() { change(fibers[thread_id].at, scheduler); }
inline void Barrier::arrive_and_wait() {
  Fiber& fiber = fibers[thread_id];
  fiber.waits = this, fiber.round = round;
  if (++here == size) here = 0, ++round;
  if (fiber.round == round) yield_();
  fiber.waits = nullptr;
}
inline void run_fiber() {
  for (;; yield_()) body(kernel_), fibers[thread_id].done = true;
}
__attribute__((noinline)) inline void begin(Fiber& fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.data(), context.uc_stack.ss_size = fiber.stack.size(), context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  fiber.begun = true;
  if (!_setjmp(scheduler)) setcontext(&context);
}
template <typename Kernel> void launch(int blocks, int x, int y, size_t shared_bytes, Kernel kernel) {
  const int count = x * y;
  if (int(fibers.size()) < count) fibers = std::vector<Fiber>(count);
  body = [](const void* one) { (*static_cast<const Kernel*>(one))(); };
  kernel_ = &kernel;
  for (int n = 0; n < blocks; n++) {
    Block one(count, shared_bytes);
    block = &one, blockIdx = {n, 0};
    for (int i = 0; i < count; i++) {
      Fiber& fiber = fibers[i];
      fiber.done = false, fiber.waits = nullptr, fiber.open.clear(), fiber.groups.clear();
    }
    for (int left = count; left;) {
      bool moved = false;  // else everybody waits for somebody who will not come
      for (int turn = 0; turn < count; turn++) {
        const int i = descending ? count - 1 - turn : turn;
        Fiber& fiber = fibers[i];
        if (fiber.done || (fiber.waits && fiber.waits->round == fiber.round)) continue;
        thread_id = i, threadIdx = {i % x, i / x}, moved = true;
        if (fiber.begun) change(scheduler, fiber.at);
        else begin(fiber);
        left -= fiber.done;
      }
      if (!moved) std::fprintf(stderr, "threads of a block wait for ever\n"), std::abort();
    }
  }
}
inline float as_float(uint32_t b) { float f; std::memcpy(&f, &b, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t b; std::memcpy(&b, &f, 4); return b; }
inline uint32_t __float_as_uint(float f) { return as_bits(f); }
inline float __uint_as_float(uint32_t b) { return as_float(b); }
inline float __int_as_float(int b) { return as_float(uint32_t(b)); }
inline float half_of(uint16_t h) { _Float16 f; std::memcpy(&f, &h, 2); return float(f); }
inline uint16_t to_half(float x) { _Float16 f = _Float16(x); uint16_t h; std::memcpy(&h, &f, 2); return h; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
  const uint64_t both = uint64_t(y) << 32 | x;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= uint32_t(both >> 8 * (s >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
template <typename T> inline T exchange(T v, int from) {
  Warp& w = warp_();
  w.one[lane_()] = v;
  w.meet.arrive_and_wait();
  const T r = T(w.one[from]);
  w.meet.arrive_and_wait();
  return r;
}
inline float __shfl_xor_sync(uint32_t, float v, int d) { return as_float(exchange(as_bits(v), lane_() ^ d)); }
inline float __shfl_sync(uint32_t, float v, int from) { return as_float(exchange(as_bits(v), from)); }
inline int __shfl_sync(uint32_t, int v, int from) { return int(exchange(uint32_t(v), from)); }
inline bool __any_sync(uint32_t, bool p) {
  Warp& w = warp_();
  w.a[lane_()][0] = p;
  w.meet.arrive_and_wait();
  bool any = false;
  for (int i = 0; i < 32; i++) any |= w.a[i][0] != 0;
  w.meet.arrive_and_wait();
  return any;
}
inline uint32_t __ballot_sync(uint32_t, bool p) {
  Warp& w = warp_();
  w.one[lane_()] = p;
  w.meet.arrive_and_wait();
  uint32_t all = 0;
  for (int i = 0; i < 32; i++) all |= uint32_t(w.one[i]) << i;
  w.meet.arrive_and_wait();
  return all;
}
inline int __shfl_xor_sync(uint32_t, int v, int d) { return int(exchange(uint32_t(v), lane_() ^ d)); }
inline int __shfl_up_sync(uint32_t, int v, int d) {
  return int(exchange(uint32_t(v), lane_() >= d ? lane_() - d : lane_()));
}
template <typename Choose> inline uint32_t reduce(uint32_t v, Choose choose) {
  for (int d = 1; d < 32; d *= 2) v = choose(v, exchange(v, lane_() ^ d));
  return v;
}
inline uint32_t __reduce_min_sync(uint32_t, uint32_t v) {
  return reduce(v, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t v) {
  return reduce(v, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t v) {
  return reduce(v, [](uint32_t a, uint32_t b) { return a + b; });
}
inline int atomicAdd(int* at, int v) { return (*at += v) - v; }
inline void atomicOr(uint32_t* at, uint32_t v) { *at |= v; }
inline void atomicMin(uint32_t* at, uint32_t v) { *at = v < *at ? v : *at; }
inline void atomicMax(uint32_t* at, uint32_t v) { *at = v > *at ? v : *at; }
inline uint32_t __ldcg(const uint32_t* at) { return *at; }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(int(v)); }
inline int __clzll(uint64_t v) { return v ? __builtin_clzll(v) : 64; }
inline int __float2int_rn(float x) { return int(std::lrint(x)); }
inline void __syncwarp() { warp_().meet.arrive_and_wait(); }
inline void __syncthreads() { block->meet.arrive_and_wait(); }
template <typename T> inline T load_(uint32_t a) { T v; std::memcpy(&v, shared_base() + a, sizeof v); return v; }
inline uint32_t lds32(uint32_t a) { return load_<uint32_t>(a); }
inline uint2 lds64(uint32_t a) { return load_<uint2>(a); }
inline uint4 lds128(uint32_t a) { return load_<uint4>(a); }
inline void cp16(uint32_t to, const void* from) { fibers[thread_id].open.push_back({to, from}); }
inline void commit() {
  fibers[thread_id].groups.push_back({});
  fibers[thread_id].groups.back().swap(fibers[thread_id].open);
}
template <int N> inline void wait_group() {
  auto& groups = fibers[thread_id].groups;
  while (groups.size() > N) {
    for (const Copy& copy : groups.front()) std::memcpy(shared_base() + copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}
inline uint32_t pack_half(float lo, float hi) { return to_half(lo) | uint32_t(to_half(hi)) << 16; }
inline float half_lo(uint32_t a) { return half_of(uint16_t(a)); }
inline float half_hi(uint32_t a) { return half_of(uint16_t(a >> 16)); }
inline uint32_t hmul2(uint32_t a, uint32_t b) { return pack_half(half_lo(a) * half_lo(b), half_hi(a) * half_hi(b)); }
inline float bf16(uint16_t a) { return as_float(uint32_t(a) << 16); }
inline float bf_lo(uint32_t a) { return as_float(a << 16); }
inline float bf_hi(uint32_t a) { return as_float(a & 0xffff0000u); }
inline float ex2(float x) { return std::exp2(x); }
inline float lg2(float x) { return std::log2(x); }
inline uint32_t transpose8(uint32_t v) {  // lane 4g + t holds row g, columns 2t and 2t + 1
  Warp& w = warp_();
  const int g = lane_() / 4, t = lane_() % 4;
  w.a[lane_()][0] = v;
  w.meet.arrive_and_wait();
  auto at = [&](int row, int column) { return w.a[4 * row + column / 2][0] >> 16 * (column % 2) & 0xffff; };
  const uint32_t r = at(2 * t, g) | at(2 * t + 1, g) << 16;
  w.meet.arrive_and_wait();
  return r;
}
inline void mma(float* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {  // m16n8k16
  Warp& w = warp_();
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(w.a[lane_()], mine, sizeof mine);
  w.meet.arrive_and_wait();
  const int g = lane_() / 4, t = lane_() % 4;
  auto half = [&](int lane, int reg, int k) { return half_of(uint16_t(w.a[lane][reg] >> 16 * (k % 2))); };
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * (i / 2), n = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++)
      sum += double(half(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k)) * half(n * 4 + k % 8 / 2, 4 + k / 8, k);
    c[i] = float(sum);
  }
  w.meet.arrive_and_wait();
}
inline void mma_s8(int* c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {  // m16n8k32
  Warp& w = warp_();
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(w.a[lane_()], mine, sizeof mine);
  w.meet.arrive_and_wait();
  const int g = lane_() / 4, t = lane_() % 4;
  auto byte = [&](int lane, int reg, int k) { return int(int8_t(w.a[lane][reg] >> 8 * (k % 4))); };
  for (int i = 0; i < 4; i++) {
    const int row = g + 8 * (i / 2), n = 2 * t + i % 2;
    for (int k = 0; k < 32; k++)
      c[i] += byte(row % 8 * 4 + k % 16 / 4, row / 8 + 2 * (k / 16), k) * byte(n * 4 + k % 16 / 4, 4 + k / 16, k);
  }
  w.meet.arrive_and_wait();
}
template <typename T> inline void keep(T&) {}
inline void after_earlier() {}  // kernels run one after the other
