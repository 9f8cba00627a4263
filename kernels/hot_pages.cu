// Slots for host pages that were chosen lately, and their copies into them (kernels/hot_pages_cuda.py; what is meant is
// written in kernels/hot_pages.py). For sm_80 and newer, compiled at run time.
//
// A head's slots stand in the order of their last use. A step moves those of its pages to the end of the order; the slots
// of pages that it misses are the first of the others. So nothing is sorted, no time is kept, and one pass over the order
// does both.
//
// Defined by the compiler's caller: PAYLOAD (bytes of a page), THREADS (of a lookup's block), FETCH_THREADS.

typedef unsigned int u32;
typedef unsigned char u8;
typedef long long i64;

constexpr u32 ALL = 0xffffffffu;
constexpr int WARPS = THREADS / 32;
constexpr int VECTORS = PAYLOAD / 16, MINE = (VECTORS + FETCH_THREADS - 1) / FETCH_THREADS;
static_assert(PAYLOAD % 16 == 0 && THREADS % 32 == 0 && WARPS <= 32, "whole vectors and warps");

struct Sums {
  int of[2][2][32];  // two rounds of two sums by warp: one barrier a round
};

// How many threads before this one have a and b; and all of the block, added to all_a and all_b.
struct Rank { int a, b; };
__device__ __forceinline__ Rank rank(Sums& sums, int round, bool a, bool b, int& all_a, int& all_b) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 as = __ballot_sync(ALL, a), bs = __ballot_sync(ALL, b), before = (1u << lane) - 1;
  int(&at)[2][32] = sums.of[round & 1];
  if (lane == 0) at[0][warp] = __popc(as), at[1][warp] = __popc(bs);
  __syncthreads();
  const u32 x = lane < WARPS ? at[0][lane] : 0, y = lane < WARPS ? at[1][lane] : 0;
  const u32 x0 = lane < warp ? x : 0, y0 = lane < warp ? y : 0;
  Rank found = {int(__reduce_add_sync(ALL, x0)) + all_a + __popc(as & before), int(__reduce_add_sync(ALL, y0)) + all_b + __popc(bs & before)};
  all_a += __reduce_add_sync(ALL, x), all_b += __reduce_add_sync(ALL, y);
  return found;
}

// Grid: heads. Tensors as kernels/hot_pages.py says; slots is 0 for heads from hot_heads on. Shared: a bit a slot.
extern "C" __global__ void __launch_bounds__(THREADS) hot_pages_lookup(
    const int* table, i64 table_stride, const int* pages, i64 pages_stride, const int* begins, const int* counts,
    int skip, int limit, int other_slot, int* places, i64 places_stride, int* order, int* owner, int hot_heads,
    int slots, int* missed, int most, int* asked) {
  extern __shared__ __align__(128) u8 shared[];
  __shared__ Sums sums;
  u32* used = reinterpret_cast<u32*>(shared);
  const int head = blockIdx.x, id = threadIdx.x;
  const int listed = counts[head] - skip, entries = listed < 0 ? 0 : listed < limit ? listed : limit;
  pages += head * pages_stride + begins[head] + skip;
  table += head * table_stride;
  places += head * places_stride;
  if (head >= hot_heads) slots = 0;
  const int first = other_slot + head * slots;
  order += i64(head) * slots, owner += i64(head) * slots;
  missed += i64(head) * most * 2;
  int round = 0;

  for (int i = id; i < (slots + 31) / 32; i += THREADS) used[i] = 0;
  __syncthreads();
  int on_host = 0, misses = 0;
  for (int e0 = 0; e0 < entries; e0 += THREADS) {
    const int e = e0 + id;
    bool host = false, miss = false;
    if (e < entries) {
      const int page = pages[e], at = table[page], place = places[page];
      host = slots && at >= other_slot, miss = host && place < other_slot;
      if (!host) places[page] = at;
      if (host && !miss) atomicOr(used + (place - first) / 32, 1u << (place - first) % 32);
    }
    rank(sums, round++, host, miss, on_host, misses);  // a barrier behind what was written before it
  }
  if (id == 0) asked[2 * head] = on_host, asked[2 * head + 1] = misses;

  // The order without the slots that are used now: the first `misses` of it are given away, the others move up. A write
  // lands at or before what its round has read, so that one round is ahead.
  int idle = 0, none = 0, next = id < slots ? order[id] : 0;
  for (int i0 = 0; i0 < slots; i0 += THREADS) {
    const int i = i0 + id, slot = next;
    if (i + THREADS < slots) next = order[i + THREADS];
    const bool free = i < slots && !(used[slot / 32] >> slot % 32 & 1);
    const int at = rank(sums, round++, free, false, idle, none).a;
    if (free && at < misses) missed[2 * at] = slot;
    if (free && at >= misses) order[at - misses] = slot;
  }

  int hosts = 0, given = 0;
  for (int e0 = 0; e0 < entries; e0 += THREADS) {
    const int e = e0 + id;
    bool host = false, miss = false;
    int page = 0, at = 0, slot = 0;
    if (e < entries) {
      page = pages[e], at = table[page];
      const int place = places[page];
      host = slots && at >= other_slot, miss = host && place < other_slot, slot = place - first;
    }
    const Rank mine = rank(sums, round++, host, miss, hosts, given);
    if (miss) {
      slot = missed[2 * mine.b];
      const int gone = owner[slot];
      if (gone >= 0 && places[gone] == first + slot) places[gone] = -1;  // else it has got another slot since
      owner[slot] = page, places[page] = first + slot;
      missed[2 * mine.b] = head * slots + slot, missed[2 * mine.b + 1] = at - other_slot;
    }
    if (host) order[slots - on_host + mine.a] = slot;
  }
}

// Grid: any number of blocks. A block has a whole page in flight, and the number of its next one.
extern "C" __global__ void __launch_bounds__(FETCH_THREADS) hot_pages_fetch(
    const u8* other, u8* memory, const int* missed, int most, const int* asked, int heads, int workers) {
  const int lane = threadIdx.x & 31;
  int before = 0, counts = 0;
  for (int head = 0; head < heads; ++head) {
    if (head % 32 == 0) counts = head + lane < heads ? asked[2 * (head + lane) + 1] : 0;
    const int count = __shfl_sync(ALL, counts, head % 32);
    const uint2* list = reinterpret_cast<const uint2*>(missed) + i64(head) * most;
    int i = (blockIdx.x + workers - before % workers) % workers;  // goes on with the block behind the last head's last
    uint2 next = i < count ? list[i] : uint2{0, 0};
    for (; i < count; i += workers) {
      const uint4* from = reinterpret_cast<const uint4*>(other + i64(next.y) * PAYLOAD);
      uint4* to = reinterpret_cast<uint4*>(memory + i64(next.x) * PAYLOAD);
      uint4 held[MINE];
#pragma unroll
      for (int v = 0; v < MINE; ++v)
        if (v * FETCH_THREADS + threadIdx.x < VECTORS) held[v] = from[v * FETCH_THREADS + threadIdx.x];
      if (i + workers < count) next = list[i + workers];
#pragma unroll
      for (int v = 0; v < MINE; ++v)
        if (v * FETCH_THREADS + threadIdx.x < VECTORS) to[v * FETCH_THREADS + threadIdx.x] = held[v];
    }
    before += count;
  }
}
