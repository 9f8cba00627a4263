// Paged split-KV decode attention over INT4 pages (and k5v3's) for sm_80 and newer, compiled at run time (kernels/page_decode_cuda.py).
//
// A warp takes one page at a time through its own ring of STAGES pages in shared memory (cp.async, no block barrier).
// Both products are mma.m16n8k16 with the page as the A operand and the group of query heads as the N side (8):
//
//   scores^T [tokens x group]   = keys [tokens x channels]   . (q * key scale)^T [channels x group]
//   out^T    [channels x group] = values^T [channels x tokens] . (p * value scale)^T [tokens x group]
//
// An A register wants two k-neighbours of one row in its halves. prmt joins two packed words (two channels of the same
// tokens, or two tokens of the same channels), and `and` leaves a nibble in the low bits of each half: as float16 that
// is the subnormal nibble * 2^-24 (16 times that for a high nibble), exact, with no conversion and no bias. Powers of
// two are taken out of the float32 accumulators. The order of k is free, so a thread reads what lies side by side.
//
// Keys of 5 bits (KEY_BITS, page format k5v3) have their highest bit in the byte of the values that has the same number,
// as the highest bit of that nibble; values have 3. The fifth bit joins its nibble in the register: 5 bits are as
// subnormal as 4.
//
// Defined by the compiler's caller: HEAD_DIM (64, 128), STAGES, WARPS, KEY_BITS (4, 5).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;

constexpr int D = HEAD_DIM, PAGE = 64;
constexpr int KT = D / 4;                       // key channels of a thread
constexpr int KT_BYTES = KT * PAGE / 2 + 32;    // padded by 32 bytes, so that the four threads meet unlike banks
constexpr int K_BYTES = 4 * KT_BYTES;
constexpr int V_ROW = D / 2;
constexpr int VT_BYTES = 8 * V_ROW + 32;        // eight tokens of a thread, padded likewise
constexpr int V_BYTES = PAGE / 8 * VT_BYTES;
constexpr int INDEX_AT = K_BYTES + V_BYTES, SCALES_AT = INDEX_AT + 4 * D;
constexpr int STAGE_BYTES = SCALES_AT + 4 * PAGE;
constexpr int PAYLOAD = PAGE * D + 4 * PAGE;    // of a page in either memory
constexpr int WARP_BYTES = STAGES * STAGE_BYTES;
constexpr int TILES = D / 16;                   // tiles of output channels; also k-steps of the scores
constexpr int C16 = D / 16;                     // output channels of a thread in each half
constexpr u32 LOW = 0x000f000fu, HIGH = 0x00f000f0u, ALL = 0xffffffffu;
constexpr u32 FIFTH_LOW = 0x00100010u, FIFTH_HIGH = 0x01000100u;
constexpr u32 VALUE_LOW = KEY_BITS == 5 ? 0x00070007u : LOW, VALUE_HIGH = KEY_BITS == 5 ? 0x00700070u : HIGH;
constexpr float TWO24 = 16777216.f, TWO20 = 1048576.f, TWO_24 = 1.f / TWO24, TWO_20 = 1.f / TWO20;
constexpr float LN2 = 0.6931471805599453f;
// Probabilities are 2^(score - ref): ref stays until a score passes ref + RISE, and is then set to FALL below the
// maximum. The spare range keeps small probabilities out of float16's subnormals.
constexpr float RISE = 8.f, FALL = 5.f;
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ u32 lds32(u32 a) { u32 v; asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
__device__ __forceinline__ uint2 lds64(u32 a) {
  uint2 v; asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a)); return v; }
__device__ __forceinline__ uint4 lds128(u32 a) {
  uint4 v; asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a)); return v; }
__device__ __forceinline__ void cp16(u32 to, const u8* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(to), "l"(from) : "memory"); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_group() { asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory"); }
__device__ __forceinline__ u32 hmul2(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 pack_half(float lo, float hi) {
  u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
__device__ __forceinline__ float half_lo(u32 a) {
  float f; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(a)); return f; }
__device__ __forceinline__ float half_hi(u32 a) {
  float f; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(a)); return f; }
__device__ __forceinline__ float bf_lo(u32 a) { return __uint_as_float(a << 16); }
__device__ __forceinline__ float bf_hi(u32 a) { return __uint_as_float(a & 0xffff0000u); }
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 transpose8(u32 a) {
  u32 d; asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a)); return d; }
__device__ __forceinline__ void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }
// Four tiles from the words of two k-pairs: byte b of the words is tile b, its nibbles are rows g and g + 8.
template <u32 LO, u32 HI>
__device__ __forceinline__ void mma_bytes(float (*c)[4], u32 w0, u32 w1, u32 w2, u32 w3, u32 b0, u32 b1) {
  u32 x = __byte_perm(w0, w1, 0x5410), y = __byte_perm(w0, w1, 0x7632);
  u32 z = __byte_perm(w2, w3, 0x5410), w = __byte_perm(w2, w3, 0x7632);
  mma(c[0], x & LO, x & HI, z & LO, z & HI, b0, b1);
  mma(c[2], y & LO, y & HI, w & LO, w & HI, b0, b1);
  x >>= 8, y >>= 8, z >>= 8, w >>= 8;
  mma(c[1], x & LO, x & HI, z & LO, z & HI, b0, b1);
  mma(c[3], y & LO, y & HI, w & LO, w & HI, b0, b1);
}
// Two of four tiles with fifth bits: x, z nibbles and h, i the words with their fifth bits, all of them joined by prmt.
__device__ __forceinline__ void mma_five(float* even, float* odd, u32 x, u32 z, u32 h, u32 i, u32 b0, u32 b1) {
  u32 f = h << 1, n = i << 1;
  mma(even, (x & LOW) | (f & FIFTH_LOW), (x & HIGH) | (f & FIFTH_HIGH), (z & LOW) | (n & FIFTH_LOW), (z & HIGH) | (n & FIFTH_HIGH), b0, b1);
  x >>= 8, z >>= 8, f = h >> 7, n = i >> 7;
  mma(odd, (x & LOW) | (f & FIFTH_LOW), (x & HIGH) | (f & FIFTH_HIGH), (z & LOW) | (n & FIFTH_LOW), (z & HIGH) | (n & FIFTH_HIGH), b0, b1);
}
// `mma_bytes` of keys with 5 bits: words at w, those with the fifth bits at h, 32 bytes from one to the next.
__device__ __forceinline__ void mma_fives(float (*c)[4], u32 w, u32 h, u32 b0, u32 b1) {
  u32 w0 = lds32(w), w1 = lds32(w + 32), w2 = lds32(w + 64), w3 = lds32(w + 96);
  u32 h0 = lds32(h), h1 = lds32(h + 32), h2 = lds32(h + 64), h3 = lds32(h + 96);
  mma_five(c[0], c[1], __byte_perm(w0, w1, 0x5410), __byte_perm(w2, w3, 0x5410), __byte_perm(h0, h1, 0x5410), __byte_perm(h2, h3, 0x5410), b0, b1);
  mma_five(c[2], c[3], __byte_perm(w0, w1, 0x7632), __byte_perm(w2, w3, 0x7632), __byte_perm(h0, h1, 0x7632), __byte_perm(h2, h3, 0x7632), b0, b1);
}

__device__ __forceinline__ void fetch(u32 to, const u8* page, const u8* index, int lane) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    int c = lane + 32 * i;
    cp16(to + c * 16 + c / (D / 2) * 32, page + c * 16);
  }
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    int c = lane + 32 * i;
    cp16(to + K_BYTES + c * 16 + c / (D / 4) * 32, page + 32 * D + c * 16);
  }
  if (lane < D / 4) cp16(to + INDEX_AT + lane * 16, index + lane * 16);
  if (lane < 16) cp16(to + SCALES_AT + lane * 16, page + 64 * D + lane * 16);
}

struct State {  // of a warp: out^T in units of 2^-24 (rows g) and 2^-20 (rows g + 8), columns 2t and 2t + 1
  float acc[TILES][4];
  float ref0, ref1, sum0, sum1, add0, add1;
  __device__ __forceinline__ void raise(float to0, float to1) {
    float f0 = ex2(ref0 - to0), f1 = ex2(ref1 - to1);
#pragma unroll
    for (int j = 0; j < TILES; ++j) acc[j][0] *= f0, acc[j][1] *= f1, acc[j][2] *= f0, acc[j][3] *= f1;
    sum0 *= f0, sum1 *= f1, add0 *= f0, add1 *= f1, ref0 = to0, ref1 = to1;
  }
};

// One page, of which the tokens from hide_from to hide_to are hidden, not all of them.
__device__ __forceinline__ void attend_page(State& st, u32 at, const u32* q, float to_log2, int hide_from, int hide_to, int g, int t) {
  u32 b[D / 8];
  float bias[4] = {0.f, 0.f, 0.f, 0.f};
  const u32 index = at + INDEX_AT + t * KT * 2;
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    uint4 s = lds128(index + i * 16), m = lds128(index + 2 * D + i * 16);
    b[4 * i] = hmul2(q[4 * i], s.x), b[4 * i + 1] = hmul2(q[4 * i + 1], s.y);
    b[4 * i + 2] = hmul2(q[4 * i + 2], s.z), b[4 * i + 3] = hmul2(q[4 * i + 3], s.w);
    mma(bias, m.x, m.x, m.y, m.y, q[4 * i], q[4 * i + 1]);
    mma(bias, m.z, m.z, m.w, m.w, q[4 * i + 2], q[4 * i + 3]);
  }
  float c[4][4] = {};
  const u32 keys = at + t * KT_BYTES + g * 4;
  const u32 fifths = at + K_BYTES + 2 * t * VT_BYTES + g * 4;  // the same byte numbers, past as much padding as stands there
#pragma unroll
  for (int s = 0; s < TILES; ++s) {
    u32 a = keys + s * 128;
    if constexpr (KEY_BITS == 5) mma_fives(c, a, fifths + s * 128 + s / (TILES / 2) * 32, b[2 * s], b[2 * s + 1]);
    else mma_bytes<LOW, HIGH>(c, lds32(a), lds32(a + 32), lds32(a + 64), lds32(a + 96), b[2 * s], b[2 * s + 1]);
  }
  const float low = to_log2 * TWO24, high = to_log2 * TWO20, bias0 = bias[0] * to_log2, bias1 = bias[1] * to_log2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c[i][0] = c[i][0] * low + bias0, c[i][1] = c[i][1] * low + bias1;
    c[i][2] = c[i][2] * high + bias0, c[i][3] = c[i][3] * high + bias1;
  }
  if (hide_from < PAGE && hide_to > 0) {  // c[i]: tokens 4g + i, and 32 after it
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int lo = 4 * g + i, hi = lo + 32;
      if (lo >= hide_from && lo < hide_to) c[i][0] = c[i][1] = -INF;
      if (hi >= hide_from && hi < hide_to) c[i][2] = c[i][3] = -INF;
    }
  }
  float max0 = -INF, max1 = -INF;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    max0 = fmaxf(max0, fmaxf(c[i][0], c[i][2])), max1 = fmaxf(max1, fmaxf(c[i][1], c[i][3]));
  }
  if (__any_sync(ALL, max0 > st.ref0 + RISE || max1 > st.ref1 + RISE)) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2)
      max0 = fmaxf(max0, __shfl_xor_sync(ALL, max0, d)), max1 = fmaxf(max1, __shfl_xor_sync(ALL, max1, d));
    st.raise(fmaxf(st.ref0, max0 - FALL), fmaxf(st.ref1, max1 - FALL));
  }
  const u32 scales = at + SCALES_AT + g * 8;  // tokens 4g .. 4g + 3, and 32 after them; minima 128 bytes on
  uint2 s_lo = lds64(scales), s_hi = lds64(scales + 64), m_lo = lds64(scales + 128), m_hi = lds64(scales + 192);
  u32 p[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 sl = i < 2 ? s_lo.x : s_lo.y, sh = i < 2 ? s_hi.x : s_hi.y, ml = i < 2 ? m_lo.x : m_lo.y, mh = i < 2 ? m_hi.x : m_hi.y;
    float vl = i & 1 ? half_hi(sl) : half_lo(sl), vh = i & 1 ? half_hi(sh) : half_lo(sh);
    float nl = i & 1 ? half_hi(ml) : half_lo(ml), nh = i & 1 ? half_hi(mh) : half_lo(mh);
    float p0 = ex2(c[i][0] - st.ref0), p1 = ex2(c[i][1] - st.ref1), p2 = ex2(c[i][2] - st.ref0), p3 = ex2(c[i][3] - st.ref1);
    st.sum0 += p0 + p2, st.sum1 += p1 + p3;
    st.add0 += p0 * nl, st.add1 += p1 * nl;
    st.add0 += p2 * nh, st.add1 += p3 * nh;
    p[i][0] = transpose8(pack_half(p0 * vl, p1 * vl));
    p[i][1] = transpose8(pack_half(p2 * vh, p3 * vh));
  }
  // A page's own sum, added in float32 afterwards: tensor cores cut off what they add, always towards zero, and over
  // a million tokens that is a bias.
  float page[TILES][4] = {};
  const u32 values = at + K_BYTES + t * VT_BYTES + g * (D / 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 a = values + i * V_ROW;
    if constexpr (D == 128) {
      uint2 w0 = lds64(a), w1 = lds64(a + 4 * V_ROW), w2 = lds64(a + 4 * VT_BYTES), w3 = lds64(a + 4 * VT_BYTES + 4 * V_ROW);
      mma_bytes<VALUE_LOW, VALUE_HIGH>(page, w0.x, w1.x, w2.x, w3.x, p[i][0], p[i][1]);
      mma_bytes<VALUE_LOW, VALUE_HIGH>(page + 4, w0.y, w1.y, w2.y, w3.y, p[i][0], p[i][1]);
    } else {
      mma_bytes<VALUE_LOW, VALUE_HIGH>(page, lds32(a), lds32(a + 4 * V_ROW), lds32(a + 4 * VT_BYTES), lds32(a + 4 * VT_BYTES + 4 * V_ROW), p[i][0], p[i][1]);
    }
  }
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) st.acc[j][e] += page[j][e];
}

// One exact token: k, v bf16 [D].
__device__ __forceinline__ void attend_token(State& st, const u16* k, const u16* v, const u32* q, float to_log2, int g, int t) {
  const u32* kw = reinterpret_cast<const u32*>(k + t * KT);
  float s = 0.f;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    u32 w = kw[m];
    s += half_lo(q[m]) * bf_lo(w);
    s += half_hi(q[m]) * bf_hi(w);
  }
  s += __shfl_xor_sync(ALL, s, 1);
  s += __shfl_xor_sync(ALL, s, 2);
  s *= to_log2;
  float s0 = __shfl_sync(ALL, s, 8 * t), s1 = __shfl_sync(ALL, s, 8 * t + 4);
  st.raise(s0 > st.ref0 + RISE ? s0 - FALL : st.ref0, s1 > st.ref1 + RISE ? s1 - FALL : st.ref1);
  float p0 = ex2(s0 - st.ref0), p1 = ex2(s1 - st.ref1);
  if (g == 0) st.sum0 += p0, st.sum1 += p1;
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
    float lo = __uint_as_float(u32(v[g * C16 + j]) << 16) * TWO_24, hi = __uint_as_float(u32(v[D / 2 + g * C16 + j]) << 16) * TWO_20;
    st.acc[j][0] += p0 * lo, st.acc[j][1] += p1 * lo, st.acc[j][2] += p0 * hi, st.acc[j][3] += p1 * hi;
  }
}

// Grid: heads * splits, split fastest. View and exact tokens as kernels/page_view.py says; origin: position of the first
// token of page 0; lengths: null where there are no exact tokens.
// part_out float32 [heads, splits, group, D], part_ml float32 [heads, splits, group, 2]: log2 reference and sum.
extern "C" __global__ void __launch_bounds__(32 * WARPS) page_decode_split(
    const void* q_in, int q_is_bf16, const u8* storage, const u8* other, int other_slot, const int* table, i64 table_stride,
    const u8* index, i64 index_stride, const int* pages, i64 pages_stride, const int* begins, const int* counts,
    const int* first, int skip, int limit, int sink_size, int origin,
    const u16* sink_k, const u16* sink_v, i64 sink_stride, const u16* tail_k, const u16* tail_v, i64 tail_stride,
    const int* lengths, float* part_out, float* part_ml, int group, int splits, float to_log2) {
  extern __shared__ __align__(128) u8 shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int head = blockIdx.x / splits, split = blockIdx.x % splits;
  const int worker = split * WARPS + warp, workers = splits * WARPS;
  const int listed = counts[head] - skip, entries = listed < 0 ? 0 : listed < limit ? listed : limit;
  const int begin = int(i64(entries) * worker / workers), count = int(i64(entries) * (worker + 1) / workers) - begin;
  const int seen_from = first[head];
  pages += head * pages_stride + begins[head] + skip + begin;
  table += head * table_stride;
  index += head * index_stride;
  const u32 ring = u32(__cvta_generic_to_shared(shared)) + warp * WARP_BYTES;

  // Page numbers and slots of 32 entries at a time, a lane each. While they are used, the next 32 slots are loaded, and
  // the 32 page numbers after those, so that neither load waits for the other.
  auto number_of = [&](int i) { return i < count ? pages[i] : 0; };
  auto slot_of = [&](int i, int page) { return i < count ? table[page] : 0; };
  int page = number_of(lane), next_page = number_of(lane + 32), third_page = number_of(lane + 64);
  int slot = slot_of(lane, page), next_slot = slot_of(lane + 32, next_page);
  auto request = [&](int i) {  // of entry i; returns its page number
    int now = 0;
    if (i < count) {
      if (i && (i & 31) == 0) {
        page = next_page, slot = next_slot, next_page = third_page;
        next_slot = slot_of(i + 32 + lane, next_page);
        third_page = number_of(i + 64 + lane);
      }
      now = __shfl_sync(ALL, page, i & 31);
      const int at = __shfl_sync(ALL, slot, i & 31);
      const u8* payload = at < other_slot ? storage + i64(at) * PAYLOAD : other + i64(at - other_slot) * PAYLOAD;
      fetch(ring + i % STAGES * STAGE_BYTES, payload, index + i64(now) * (4 * D), lane);
    }
    commit();
    return now;
  };
  int requested[STAGES - 1];  // page numbers of the entries to come
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) requested[i] = request(i);

  u32 q[D / 8];
  const i64 row = (i64(head) * group + g) * D + t * KT;
#pragma unroll
  for (int m = 0; m < D / 8; ++m) {
    q[m] = 0;
    if (g < group) {
      if (q_is_bf16) {
        u32 w = reinterpret_cast<const u32*>(static_cast<const u16*>(q_in) + row)[m];
        q[m] = pack_half(bf_lo(w), bf_hi(w));
      } else {
        float2 w = reinterpret_cast<const float2*>(static_cast<const float*>(q_in) + row)[m];
        q[m] = pack_half(w.x, w.y);
      }
    }
  }
  State st = {};
  st.ref0 = st.ref1 = -INF;
  const int sinks = lengths ? lengths[0] : 0, tails = lengths ? lengths[1] : 0, tail_start = lengths ? lengths[2] : 0;
  for (int e = worker; e < sinks + tails; e += workers) {
    bool in_tail = e >= sinks;
    int position = in_tail ? tail_start + (e - sinks) : e;
    if (position >= sink_size && position < seen_from) continue;
    i64 at = in_tail ? head * tail_stride + i64(e - sinks) * D : head * sink_stride + i64(e) * D;
    attend_token(st, (in_tail ? tail_k : sink_k) + at, (in_tail ? tail_v : sink_v) + at, q, to_log2, g, t);
  }
  int stage = 0;
  for (int i = 0; i < count; ++i) {
    wait_group<STAGES - 2>();
    __syncwarp();
    const int position = requested[0] * PAGE + origin, hide_from = sink_size - position, hide_to = seen_from - position;
#pragma unroll
    for (int s = 0; s < STAGES - 2; ++s) requested[s] = requested[s + 1];
    requested[STAGES - 2] = request(i + STAGES - 1);
    if (hide_from > 0 || hide_to < PAGE) attend_page(st, ring + stage * STAGE_BYTES, q, to_log2, hide_from, hide_to, g, t);
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  wait_group<0>();
#pragma unroll
  for (int d = 4; d < 32; d *= 2) {
    st.sum0 += __shfl_xor_sync(ALL, st.sum0, d), st.sum1 += __shfl_xor_sync(ALL, st.sum1, d);
    st.add0 += __shfl_xor_sync(ALL, st.add0, d), st.add1 += __shfl_xor_sync(ALL, st.add1, d);
  }
  __syncthreads();
  float* outs = reinterpret_cast<float*>(shared);       // [WARPS][8][D]
  float* stats = outs + WARPS * 8 * D;                   // [WARPS][8][2]
  float* mine = outs + (warp * 8 + 2 * t) * D;
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
    int lo = g * C16 + j, hi = lo + D / 2;
    mine[lo] = st.acc[j][0] * TWO24 + st.add0, mine[D + lo] = st.acc[j][1] * TWO24 + st.add1;
    mine[hi] = st.acc[j][2] * TWO20 + st.add0, mine[D + hi] = st.acc[j][3] * TWO20 + st.add1;
  }
  if (g == 0) {
    float* s = stats + (warp * 8 + 2 * t) * 2;
    s[0] = st.ref0, s[1] = st.sum0, s[2] = st.ref1, s[3] = st.sum1;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < group * D; e += 32 * WARPS) {
    int n = e / D;
    float top = -INF, sum = 0.f, out = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, stats[(w * 8 + n) * 2]);
    if (top > -INF) {
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        float f = ex2(stats[(w * 8 + n) * 2] - top);
        sum += f * stats[(w * 8 + n) * 2 + 1], out += f * outs[(w * 8 + n) * D + e % D];
      }
    }
    i64 to = i64(blockIdx.x) * group;
    part_out[to * D + e] = out;
    if (e % D == 0) part_ml[(to + n) * 2] = top, part_ml[(to + n) * 2 + 1] = sum;
  }
}

// Grid: heads * group; block (D, 4). out float32 [heads, group, D], lse float32 [heads, group], natural.
// splits <= MAX_SPLITS (page_decode_cuda.py asserts it).
constexpr int MAX_SPLITS = 1024;
extern "C" __global__ void __launch_bounds__(4 * D) page_decode_merge(
    const float* part_out, const float* part_ml, float* out, float* lse, int group, int splits) {
  __shared__ float weights[MAX_SPLITS], outs[4][D], tops[D / 8], sums[D / 8];
  const int head = blockIdx.x / group, n = blockIdx.x % group, d = threadIdx.x, y = threadIdx.y, id = y * D + d;
  const i64 base = i64(head) * splits * group + n;
  const float2* stats = reinterpret_cast<const float2*>(part_ml);
  float top = -INF, sum = 0.f, acc = 0.f;
  for (int s = id; s < splits; s += 4 * D) top = fmaxf(top, stats[base + i64(s) * group].x);
#pragma unroll
  for (int o = 1; o < 32; o *= 2) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
  if (id % 32 == 0) tops[id / 32] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < D / 8; ++w) top = fmaxf(top, tops[w]);
  for (int s = id; s < splits; s += 4 * D) {
    float2 found = stats[base + i64(s) * group];
    float f = found.x > -INF ? ex2(found.x - top) : 0.f;
    weights[s] = f, sum += f * found.y;
  }
#pragma unroll
  for (int o = 1; o < 32; o *= 2) sum += __shfl_xor_sync(ALL, sum, o);
  if (id % 32 == 0) sums[id / 32] = sum;
  __syncthreads();
#pragma unroll 8
  for (int s = y; s < splits; s += 4) acc += weights[s] * part_out[(base + i64(s) * group) * D + d];
  outs[y][d] = acc;
  __syncthreads();
  if (y == 0) {
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < D / 8; ++w) sum += sums[w];
    acc = outs[0][d] + outs[1][d] + outs[2][d] + outs[3][d];
    out[i64(blockIdx.x) * D + d] = sum > 0.f ? acc / sum : 0.f;
    if (d == 0) lse[blockIdx.x] = (top + log2f(sum)) * LN2;
  }
}
