// Scores of pages by their digests, and the choice of the best, for sm_80 and newer (kernels/page_select_cuda.py).
//
// Scoring: a warp takes four pages at a time, 16 groups, through its own ring of STAGES such tiles in shared memory
// (cp.async, no block barrier). Groups are the rows of mma.m16n8k32 over int8, the query heads its columns: codes of
// centres enter as they are, nibbles after one `and`. A query is two int8 numbers a channel, 256 * high + low, with one
// scale a head, so its rounding is 2^-16 of its largest channel and sums of products are exact. The order of k is free, so
// a thread takes words that lie side by side. |q unrotated| needs no signs: it is |Hadamard * q|.
//
// Choosing is four kernels, so that none waits for another block: totals of every query head; values of the pages and a
// histogram of them; a bit for every page above the bin that holds the last one to be chosen, and a list of that bin's;
// the best of those, and all chosen pages in the order of the list. Every step is a count or an exact comparison but the
// totals, which are rounded to 1/NORM_STEPS, so the result does not depend on the order in which blocks run.
//
// Defined by the compiler's caller: HEAD_DIM (64, 128), CENTRE_BITS (4, 8), STAGES, WARPS, NORM_STEPS,
// SHARE_STEPS (a share of a list is counted in).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
typedef unsigned long long u64;

constexpr int D = HEAD_DIM, GROUPS = 4, TILE = 4, MAX_GROUP = 8;
constexpr int SCALES_AT = D * CENTRE_BITS / 8 + D / 2, HALF_AT = D * CENTRE_BITS / 8, GROUP_BYTES = SCALES_AT + 4;
constexpr int PAGE_BYTES = GROUPS * GROUP_BYTES, CHUNKS = PAGE_BYTES / 16, TILE_BYTES = TILE * PAGE_BYTES;
constexpr int STEPS = D / 32;  // of 32 channels
constexpr int OWN = D / 32;    // channels of a lane while a query is prepared
constexpr u32 ALL = 0xffffffffu, LOW = 0x0f0f0f0fu;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float LAST_CODE = 32512.f;           // 127 * 256: its high part stays int8
constexpr float UNROTATE = D == 128 ? 1.f / 16 : 1.f / 8;  // quant.rotation.rotation_scales, of keys
constexpr int THREADS = 256, FINAL_THREADS = 1024, BINS = 2048, DIGITS = FINAL_THREADS;
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ u32 lds32(u32 a) { u32 v; asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
__device__ __forceinline__ void cp16(u32 to, const uint4* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory"); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_group() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
__device__ __forceinline__ float half_lo(u32 a) {
  float f; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(a)); return f; }
__device__ __forceinline__ float half_hi(u32 a) {
  float f; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(a)); return f; }
__device__ __forceinline__ float bf16(u16 a) { return __uint_as_float(u32(a) << 16); }
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ void mma_s8(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }
// First of all in every kernel (kernels/overlap.py): the next may be launched, and earlier ones are waited for.
__device__ __forceinline__ void after_earlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Kept in a register: else the compiler computes it again wherever it is used.
__device__ __forceinline__ void keep(u32& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(const uint4*& x) { asm volatile("" : "+l"(x)); }
// End of what tests/cuda_on_cpu.py replaces.

// Entries of a head's list that a view means, and no more than there is room for.
__device__ __forceinline__ int entries_of(const int* counts, int head, int skip, int limit, int room) {
  const int listed = counts[head] - skip, meant = listed < limit ? listed : limit;
  return meant < 0 ? 0 : meant < room ? meant : room;
}

struct Query {  // of one KV head: for q and for |q unrotated|, high and low codes of every query head, and scales
  u8 codes[2][2][MAX_GROUP][D];
  float scales[2][MAX_GROUP];
  int sums[MAX_GROUP];  // of q's codes
};

// x: OWN channels of a lane, from OWN * lane on. Codes of all of them, their scale, and the sum of the codes.
__device__ __forceinline__ void quantize(Query& query, int kind, int n, const float* x, int lane) {
  float top = 0.f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) top = fmaxf(top, fabsf(x[i]));
#pragma unroll
  for (int d = 1; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, d));
  const float to_code = top > 0.f ? LAST_CODE / top : 0.f;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int code = __float2int_rn(x[i] * to_code), high = (code + 128) >> 8;
    query.codes[kind][0][n][OWN * lane + i] = u8(high);
    query.codes[kind][1][n][OWN * lane + i] = u8(code - 256 * high);
    sum += code;
  }
#pragma unroll
  for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(ALL, sum, d);
  if (lane == 0) {
    query.scales[kind][n] = top / LAST_CODE;
    if (kind == 0) query.sums[n] = sum;
  }
}

// Query head n, zeros where the group has fewer.
__device__ __forceinline__ void prepare(Query& query, const void* q, int is_bf16, i64 row, int n, bool there, int lane) {
  float x[OWN], turned[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const i64 at = row + OWN * lane + i;
    x[i] = !there ? 0.f : is_bf16 ? bf16(static_cast<const u16*>(q)[at]) : static_cast<const float*>(q)[at];
    turned[i] = x[i];
  }
#pragma unroll
  for (int half = 1; half < OWN; half *= 2)
#pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (!(i & half)) {
        const float low = turned[i], high = turned[i + half];
        turned[i] = low + high, turned[i + half] = low - high;
      }
#pragma unroll
  for (int d = 1; d < 32; d *= 2)
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const float other = __shfl_xor_sync(ALL, turned[i], d);
      turned[i] = lane & d ? other - turned[i] : turned[i] + other;
    }
#pragma unroll
  for (int i = 0; i < OWN; ++i) turned[i] = fabsf(turned[i]);
  quantize(query, 0, n, x, lane);
  quantize(query, 1, n, turned, lane);
}

// Words of four channels that thread t takes in step s of a row of nibbles: one of low nibbles, one of high.
__device__ __forceinline__ int nibble_word(int t, int s) { return t * STEPS + s; }
// The first of two words of a row of bytes.
__device__ __forceinline__ int byte_word(int t, int s) { return 2 * (t * STEPS + s); }

// codes: [2][MAX_GROUP][D]; out [2][2 * STEPS], the B operands of high and low codes.
__device__ __forceinline__ void load_query(u32 (*out)[2 * STEPS], const u8 (*codes)[MAX_GROUP][D], bool nibbles, int g, int t) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const u32* words = reinterpret_cast<const u32*>(codes[part][g]);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int at = nibbles ? nibble_word(t, s) : byte_word(t, s);
      out[part][2 * s] = words[at], out[part][2 * s + 1] = words[at + (nibbles ? D / 8 : 1)];
    }
  }
}

// Sums over the channels of rows of nibbles or of bytes at `row` and eight rows after it; c[high or low][..].
template <bool NIBBLES>
__device__ __forceinline__ void multiply(int (*c)[4], u32 row, const u32 (*q)[2 * STEPS], int t) {
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    const u32 at = row + 4 * (NIBBLES ? nibble_word(t, s) : byte_word(t, s)), below = at + 2 * PAGE_BYTES;
    u32 a0 = lds32(at), a1 = lds32(below), a2, a3;
    if (NIBBLES) a2 = a0 >> 4 & LOW, a3 = a1 >> 4 & LOW, a0 &= LOW, a1 &= LOW;
    else a2 = lds32(at + 4), a3 = lds32(below + 4);
#pragma unroll
    for (int part = 0; part < 2; ++part) mma_s8(c[part], a0, a1, a2, a3, q[part][2 * s], q[part][2 * s + 1]);
  }
}

// Whether a chunk of 16 bytes of a page holds codes of halves only.
__device__ __forceinline__ bool only_halves(int chunk) {
  const int at = chunk * 16 % GROUP_BYTES;
  return at >= HALF_AT && at + 16 <= SCALES_AT;
}

// Grid: heads * splits, split fastest. View as kernels/page_view.py says; digest_stride: bytes a head.
// scores float32 [heads, group, room].
extern "C" __global__ void __launch_bounds__(32 * WARPS) page_select_score(
    const void* q_in, int q_is_bf16, const u8* digest, i64 digest_stride, const int* pages, i64 pages_stride,
    const int* begins, const int* counts, int skip, int limit, float* scores, int room, int group, int splits,
    float softmax_scale, float lam) {
  after_earlier();
  extern __shared__ __align__(128) u8 shared[];
  __shared__ Query query;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.x / splits, worker = blockIdx.x % splits * WARPS + warp, workers = splits * WARPS;
  const int entries = entries_of(counts, head, skip, limit, room), tiles = (entries + TILE - 1) / TILE;
  const int begin = int(i64(tiles) * worker / workers) * TILE, end = int(i64(tiles) * (worker + 1) / workers) * TILE;
  const int mine = (end < entries ? end : entries) - begin, count = (end - begin) / TILE;
  const bool halves = lam != 0.f;
  u32 ring = u32(__cvta_generic_to_shared(shared)) + warp * STAGES * TILE_BYTES;
  const uint4* chunks = reinterpret_cast<const uint4*>(digest + head * digest_stride) + lane;
  keep(ring), keep(chunks);
  pages += head * pages_stride + begins[head] + skip + begin;

  // First chunks of the pages of 32 entries at a time, a lane each, and of the 32 after them. Past the last entry stands
  // page 0, so that every tile has four.
  auto chunk_of = [&](int i) { return (i < mine ? pages[i] : 0) * CHUNKS; };
  int at = chunk_of(lane), next_at = chunk_of(lane + 32);
  const bool first_chunk = lane < CHUNKS && (halves || !only_halves(lane));
  const bool second_chunk = lane + 32 < CHUNKS && (halves || !only_halves(lane + 32));
  u32 filled = 0;  // where in the ring the next tile goes
  auto request = [&](int i) {
    if (i < count) {
      if (i && i % (32 / TILE) == 0) at = next_at, next_at = chunk_of(i * TILE + 32 + lane);
      const u32 to = ring + filled + lane * 16;
#pragma unroll
      for (int j = 0; j < TILE; ++j) {
        const uint4* from = chunks + __shfl_sync(ALL, at, (i * TILE & 31) + j);
        if (first_chunk) cp16(to + j * PAGE_BYTES, from);
        if (second_chunk) cp16(to + j * PAGE_BYTES + 512, from + 32);
      }
      filled = filled == (STAGES - 1) * TILE_BYTES ? 0 : filled + TILE_BYTES;
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) request(i);

  for (int n = warp; n < MAX_GROUP; n += WARPS)
    prepare(query, q_in, q_is_bf16, (i64(head) * group + n) * D, n, n < group, lane);
  __syncthreads();
  u32 q[2][2 * STEPS], q_half[2][2 * STEPS];
  load_query(q, query.codes[0], CENTRE_BITS == 4, g, t);
  load_query(q_half, query.codes[1], true, g, t);
  float of_centre[2], of_half[2];  // of query heads 2t and 2t + 1; scores count in log 2
  int bias[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    of_centre[e] = softmax_scale * LOG2E * query.scales[0][2 * t + e];
    of_half[e] = softmax_scale * LOG2E * lam * UNROTATE * query.scales[1][2 * t + e];
    bias[e] = CENTRE_BITS == 4 ? -8 * query.sums[2 * t + e] : 0;
  }
  const int n = 2 * t + (g & 1), in_tile = (g >> 2) + (g & 2);  // what a lane writes
  scores += (i64(head) * group + n) * room + begin + in_tile;

  u32 used = 0;
  for (int i = 0; i < count; ++i) {
    wait_group<STAGES - 2>();
    __syncwarp();
    request(i + STAGES - 1);
    // Rows g and g + 8 of the tile: group g % 4 of page g / 4, and of the page two after it.
    const u32 row = ring + used + (g >> 2) * PAGE_BYTES + (g & 3) * GROUP_BYTES;
    used = used == (STAGES - 1) * TILE_BYTES ? 0 : used + TILE_BYTES;
    const u32 scales[2] = {lds32(row + SCALES_AT), lds32(row + 2 * PAGE_BYTES + SCALES_AT)};
    int c[2][4] = {};
    float s[4];
    multiply<CENTRE_BITS == 4>(c, row, q, t);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      s[e] = float(256 * c[0][e] + c[1][e] + bias[e & 1]) * (of_centre[e & 1] * half_lo(scales[e >> 1]));
    if (halves) {
      int h[2][4] = {};
      multiply<true>(h, row + HALF_AT, q_half, t);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[e] += float(256 * h[0][e] + h[1][e]) * (of_half[e & 1] * half_hi(scales[e >> 1]));
    }
    // The four lanes of a page and two columns have a group each, s of two pages: now each gets one page and column, all
    // four groups. Their sum is (0 + 1) + (2 + 3) in every lane.
    const bool odd = g & 1, later = g & 2;
    const float a0 = odd ? s[1] : s[0], a1 = __shfl_xor_sync(ALL, odd ? s[0] : s[1], 4);
    const float b0 = odd ? s[3] : s[2], b1 = __shfl_xor_sync(ALL, odd ? s[2] : s[3], 4);
    const float c0 = later ? b0 : a0, c1 = later ? b1 : a1;
    const float c2 = __shfl_xor_sync(ALL, later ? a0 : b0, 8), c3 = __shfl_xor_sync(ALL, later ? a1 : b1, 8);
    const float top = fmaxf(fmaxf(c0, c1), fmaxf(c2, c3));
    const float sum = (ex2(c0 - top) + ex2(c1 - top)) + (ex2(c2 - top) + ex2(c3 - top));
    if (n < group && i * TILE + in_tile < mine) scores[i * TILE] = (top + lg2(sum)) * LN2;
  }
  wait_group<0>();
}

// The entries of one of `parts` blocks of a head: whole words of 32.
struct Part {
  int from, to;
  __device__ __forceinline__ Part(int entries, int part, int parts) {
    const int words = (entries + 31) / 32;
    from = int(i64(words) * part / parts) * 32, to = int(i64(words) * (part + 1) / parts) * 32;
    to = to < entries ? to : entries;
  }
};

constexpr float LEAST = -3.4e38f;  // below every score; finite, so that differences are numbers
__device__ __forceinline__ void add_exponent(float& top, float& sum, float other_top, float other_sum) {
  const float now = fmaxf(top, other_top);
  sum = sum * ex2((top - now) * LOG2E) + other_sum * ex2((other_top - now) * LOG2E);
  top = now;
}
__device__ __forceinline__ void reduce_exponents(float& top, float& sum) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other_top = __shfl_xor_sync(ALL, top, d), other_sum = __shfl_xor_sync(ALL, sum, d);
    add_exponent(top, sum, other_top, other_sum);
  }
}

struct TotalsShared { float stats[THREADS / 32][MAX_GROUP][2]; };

// Grid of this kernel and the two after it: heads * parts, part fastest.
// stats float32 [heads, parts, group, 2]: largest score and sum of exponents. Clears bins [heads, BINS], tied [heads].
extern "C" __global__ void __launch_bounds__(THREADS) page_select_totals(
    const float* scores, int room, int group, const int* counts, int skip, int limit, float* stats, int* bins, int* tied,
    int parts) {
  after_earlier();
  __shared__ TotalsShared mine;
  const int head = blockIdx.x / parts, part = blockIdx.x % parts, id = threadIdx.x, lane = id & 31, warp = id >> 5;
  const Part own(entries_of(counts, head, skip, limit, room), part, parts);
  for (int i = part * THREADS + id; i < BINS; i += parts * THREADS) bins[i64(head) * BINS + i] = 0;
  if (part == 0 && id == 0) tied[head] = 0;
  scores += i64(head) * group * room;
  float top[MAX_GROUP], sum[MAX_GROUP];
#pragma unroll
  for (int n = 0; n < MAX_GROUP; ++n) top[n] = LEAST, sum[n] = 0.f;
  for (int e = own.from + id; e < own.to; e += THREADS) {
    float s[MAX_GROUP];
#pragma unroll
    for (int n = 0; n < MAX_GROUP; ++n) s[n] = n < group ? scores[i64(n) * room + e] : LEAST;
#pragma unroll
    for (int n = 0; n < MAX_GROUP; ++n)
      if (n < group) add_exponent(top[n], sum[n], s[n], 1.f);
  }
#pragma unroll
  for (int n = 0; n < MAX_GROUP; ++n)
    if (n < group) {
      reduce_exponents(top[n], sum[n]);
      if (lane == 0) mine.stats[warp][n][0] = top[n], mine.stats[warp][n][1] = sum[n];
    }
  __syncthreads();
  if (id < group) {
    float all = LEAST, total = 0.f;
#pragma unroll
    for (int w = 0; w < THREADS / 32; ++w) add_exponent(all, total, mine.stats[w][id][0], mine.stats[w][id][1]);
    const i64 to = (i64(blockIdx.x) * group + id) * 2;
    stats[to] = all, stats[to + 1] = total;
  }
}

// Bins get wider with the distance from the best: 128 an octave of 1 - value. Bin 0 has the largest values.
__device__ __forceinline__ int bin_of(float value) {
  const u32 at = (__float_as_uint(fmaxf(1.f - value, 1.f)) - 0x3f800000u) >> 16;
  return at < BINS - 1 ? int(at) : BINS - 1;
}

struct ValuesShared { float totals[MAX_GROUP]; int bins[BINS]; };

// values float32 [heads, room]: the largest share in a query head's attention, as a logarithm; of the newest, infinity.
extern "C" __global__ void __launch_bounds__(THREADS) page_select_values(
    const float* scores, int room, int group, const int* counts, int skip, int limit, const float* stats, float* values,
    int* bins, int newest, int parts) {
  after_earlier();
  __shared__ ValuesShared mine;
  const int head = blockIdx.x / parts, part = blockIdx.x % parts, id = threadIdx.x, lane = id & 31, warp = id >> 5;
  const int entries = entries_of(counts, head, skip, limit, room);
  const Part own(entries, part, parts);
  for (int i = id; i < BINS; i += THREADS) mine.bins[i] = 0;
  if (warp < group) {
    float top = LEAST, sum = 0.f;
    for (int p = lane; p < parts; p += 32) {
      const i64 at = ((i64(head) * parts + p) * group + warp) * 2;
      add_exponent(top, sum, stats[at], stats[at + 1]);
    }
    reduce_exponents(top, sum);
    if (lane == 0) mine.totals[warp] = rintf((top + log2f(sum) * LN2) * NORM_STEPS) / NORM_STEPS;
  }
  __syncthreads();
  scores += i64(head) * group * room;
  for (int e = own.from + id; e < own.to; e += THREADS) {
    float s[MAX_GROUP];
#pragma unroll
    for (int n = 0; n < MAX_GROUP; ++n) s[n] = n < group ? scores[i64(n) * room + e] - mine.totals[n] : -INF;
    float value = s[0];
#pragma unroll
    for (int n = 1; n < MAX_GROUP; ++n) value = fmaxf(value, s[n]);
    value = e < entries - newest ? value : INF;
    values[i64(head) * room + e] = value;
    atomicAdd(&mine.bins[bin_of(value)], 1);
  }
  __syncthreads();
  for (int i = id; i < BINS; i += THREADS)
    if (mine.bins[i]) atomicAdd(&bins[i64(head) * BINS + i], mine.bins[i]);
}

// Sum of x over the threads before this one, and over all; sums: shared, one a warp and one more. All threads call it.
template <int N> __device__ __forceinline__ int sum_before(int x, int* sums, int* all) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(ALL, sum, d);
    if (lane >= d) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    const int its = lane < N / 32 ? sums[lane] : 0;
    int up = its;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(ALL, up, d);
      if (lane >= d) up += other;
    }
    if (lane < N / 32) sums[lane] = up - its;
    if (lane == 31) sums[N / 32] = up;
  }
  __syncthreads();
  *all = sums[N / 32];
  return sums[warp] + sum - x;
}

struct MarkShared { int sums[THREADS / 32 + 1], last_bin, needed; };

// chosen u32 [heads, words]: a bit for every entry of a bin before the last one. candidates int32 [heads, room]: the
// entries of the last bin, tied[head] of them in any order, of which needed[head] are to be chosen.
extern "C" __global__ void __launch_bounds__(THREADS) page_select_mark(
    const float* values, int room, const int* counts, int skip, int limit, const int* bins, u32* chosen, int words,
    int* candidates, int* tied, int* needed, int least, int share, int parts) {
  after_earlier();
  __shared__ MarkShared mine;
  const int head = blockIdx.x / parts, part = blockIdx.x % parts, id = threadIdx.x, lane = id & 31, warp = id >> 5;
  const int entries = entries_of(counts, head, skip, limit, room);
  const int of_share = int((i64(entries) * share + SHARE_STEPS - 1) / SHARE_STEPS);
  const int wanted = of_share > least ? of_share : least;
  const Part own(entries, part, parts);
  constexpr int EACH = BINS / THREADS;
  int in_bin[EACH], in_all = 0, total;
#pragma unroll
  for (int i = 0; i < EACH; ++i) in_bin[i] = bins[i64(head) * BINS + id * EACH + i], in_all += in_bin[i];
  if (id == 0) mine.last_bin = BINS, mine.needed = 0;  // a list that is no longer than what is wanted
  int before = sum_before<THREADS>(in_all, mine.sums, &total);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    if (before < wanted && wanted <= before + in_bin[i]) {
      const bool whole = wanted == before + in_bin[i];
      mine.last_bin = id * EACH + i + whole, mine.needed = whole ? 0 : wanted - before;
    }
    before += in_bin[i];
  }
  __syncthreads();
  const int last_bin = mine.last_bin, need = mine.needed;
  if (part == 0 && id == 0) needed[head] = need;
  values += i64(head) * room, candidates += i64(head) * room;
  for (int w = own.from / 32 + warp; w * 32 < own.to; w += THREADS / 32) {
    const int e = w * 32 + lane, bin = e < own.to ? bin_of(values[e]) : BINS + 1;
    const u32 above = __ballot_sync(ALL, bin < last_bin), ties = __ballot_sync(ALL, bin == last_bin && need);
    if (lane == 0) chosen[i64(head) * words + w] = above;
    if (ties) {
      int at = lane == 0 ? atomicAdd(&tied[head], __popc(ties)) : 0;
      at = __shfl_sync(ALL, at, 0) + __popc(ties & ((1u << lane) - 1));
      if (ties >> lane & 1) candidates[at] = e;
    }
  }
}

// Larger is better, and no two entries have the same: the value, then the lower entry.
__device__ __forceinline__ u32 rank_of(float value) {
  const u32 bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ u64 rank_of(float value, int entry) { return u64(rank_of(value)) << 32 | (ALL - u32(entry)); }

struct WriteShared { int sums[FINAL_THREADS / 32 + 1], digits[DIGITS], digit, left, whole; u32 least, most; };

// Grid: heads. pages_out: the chosen pages in the order of the list.
extern "C" __global__ void __launch_bounds__(FINAL_THREADS, 1) page_select_write(
    const float* values, int room, const int* pages, i64 pages_stride, const int* begins, const int* counts, int skip,
    int limit, u32* chosen, int words, const int* candidates, const int* tied, const int* needed, int* pages_out,
    i64 out_stride, int* counts_out) {
  after_earlier();
  __shared__ WriteShared mine;
  const int head = blockIdx.x, id = threadIdx.x, lane = id & 31;
  const int entries = entries_of(counts, head, skip, limit, room), listed = tied[head];
  values += i64(head) * room, candidates += i64(head) * room, chosen += i64(head) * words;
  int need = needed[head], total;
  if (need) {
    // The rank of the last one to be chosen: digits of ten bits between the least and the largest rank that are left,
    // until all of a digit's are to be chosen.
    if (id == 0) mine.least = ALL, mine.most = 0;
    __syncthreads();
    u32 least = ALL, most = 0;
    for (int i = id; i < listed; i += FINAL_THREADS) {
      const u32 rank = rank_of(values[candidates[i]]);
      least = rank < least ? rank : least, most = rank > most ? rank : most;
    }
    least = __reduce_min_sync(ALL, least), most = __reduce_max_sync(ALL, most);
    if (lane == 0) atomicMin(&mine.least, least), atomicMax(&mine.most, most);
    __syncthreads();
    u64 low = u64(mine.least) << 32, high = u64(mine.most) << 32 | ALL;
    while (true) {
      const int bits = 64 - __clzll(high - low), shift = bits > 10 ? bits - 10 : 0;
      mine.digits[id] = 0;
      __syncthreads();
      for (int i = id; i < listed; i += FINAL_THREADS) {
        const int e = candidates[i];
        const u64 rank = rank_of(values[e], e);
        if (rank >= low && rank <= high) atomicAdd(&mine.digits[(rank - low) >> shift], 1);
      }
      __syncthreads();
      const int digit = DIGITS - 1 - id, count = mine.digits[digit], above = sum_before<FINAL_THREADS>(count, mine.sums, &total);
      if (above < need && need <= above + count) mine.digit = digit, mine.left = need - above, mine.whole = need == above + count;
      __syncthreads();
      low += u64(mine.digit) << shift;
      const u64 last = low + ((1ull << shift) - 1);
      high = last < high ? last : high, need = mine.left;
      if (mine.whole) break;
    }
    for (int i = id; i < listed; i += FINAL_THREADS) {
      const int e = candidates[i];
      if (rank_of(values[e], e) >= low) atomicOr(&chosen[e >> 5], 1u << (e & 31));
    }
    __syncthreads();
  }
  const int used = (entries + 31) / 32, each = (used + FINAL_THREADS - 1) / FINAL_THREADS;
  const int from = id * each < used ? id * each : used, to = from + each < used ? from + each : used;
  int count = 0;
  for (int w = from; w < to; ++w) count += __popc(__ldcg(&chosen[w]));
  int at = sum_before<FINAL_THREADS>(count, mine.sums, &total);
  pages_out += head * out_stride;
  for (int w = from; w < to; ++w)
    for (u32 left = __ldcg(&chosen[w]); left; left &= left - 1) pages_out[at++] = w * 32 + __ffs(left) - 1;
  __syncthreads();
  pages += head * pages_stride + begins[head] + skip;
  for (int i = id; i < total; i += FINAL_THREADS) pages_out[i] = pages[pages_out[i]];
  if (id == 0) counts_out[head] = total;
}
