// Kernels for int4 and k5v3 pages on the CPU: fused split-KV decode attention and page dequantization.
//
// Page layout: see quant/kv_format.py; `key_bits` tells the format, 4 for int4 and 5 for k5v3. Both halves of attention
// are one product of a small float matrix with a nibble matrix, C[g][n] = sum_k A[g][k] * B[k][n]:
//   scores   A = q * key scale (per channel), B = keys [D][P]    (the key minimum adds q . min to every token)
//   output   A = p * value scale (per token), B = values [P][D]  (the value minimum adds sum(p * min) to every channel)
// so that steps go from memory to fused multiply-add without a dequantized copy; only five-bit keys are put together
// before, a byte each. Partial results of page ranges are merged by log-sum-exp (FlashDecoding).
//
// The product takes bytes as they lie, in lanes of four (two, one, where rows are short), and so its columns come in
// lane order: token 0, 4, 8, .. of a row's first 32 bytes, then 1, 5, 9, .. Scores stay in that order, and so does the
// output until the last page is through.
//
// Plain C interface, called through ctypes (kernels/cpu_pages.py). Built for the machine it runs on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));
typedef uint8_t v8b __attribute__((vector_size(8)));
constexpr int MAX_GROUP = 8;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

inline v8f load8(const float* p) { v8f r; std::memcpy(&r, p, 32); return r; }
inline void store8(float* p, v8f v) { std::memcpy(p, &v, 32); }
inline v8f splat(float x) { return v8f{x, x, x, x, x, x, x, x}; }
inline float sum8(v8f v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

template <typename To, typename From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out; std::memcpy(&out, &x, sizeof(To));
  return out;
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
  if (magnitude >= 0x7c00u << 13) return bits_as<float>(sign | 0x7f800000 | magnitude);
  // the exponent is still biased by 15; the product rebiases it and is exact for subnormals too
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f));
}

void halves_to_floats(const uint16_t* from, float* to, int n) {
  for (int i = 0; i < n; i++) to[i] = half_to_float(from[i]);
}

inline uint16_t float_to_bf16(float x) {  // round to nearest even; inputs are finite
  const uint32_t bits = bits_as<uint32_t>(x);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp for x <= 0, relative error about 2e-7: 2^n * polynomial on [-ln2/2, ln2/2] (degree 6 Taylor).
inline v8f exp8(v8f x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;
  const v8f t = x * splat(1.44269504088896341f);
  const v8i n = __builtin_convertvector(t - splat(0.5f), v8i);  // t <= 0: truncation toward zero rounds to nearest
  const v8f nf = __builtin_convertvector(n, v8f);
  v8f r = x - nf * splat(0.693359375f);
  r = r + nf * splat(2.12194440e-4f);
  v8f p = splat(1.0f / 720);
  p = p * r + splat(1.0f / 120);
  p = p * r + splat(1.0f / 24);
  p = p * r + splat(1.0f / 6);
  p = p * r + splat(0.5f);
  p = p * r + splat(1.0f);
  p = p * r + splat(1.0f);
  return p * bits_as<v8f>((n + 127) << 23);
}

// 8 * L bytes as 8 lanes of L bytes each.
template <int L>
inline v8u lanes(const uint8_t* p) {
  if constexpr (L == 4) { v8u r; std::memcpy(&r, p, 32); return r; }
  if constexpr (L == 2) { v8h r; std::memcpy(&r, p, 16); return __builtin_convertvector(r, v8u); }
  v8b r; std::memcpy(&r, p, 8);
  return __builtin_convertvector(__builtin_convertvector(r, v8h), v8u);  // at once, g++ 12 goes in halves
}

// Steps are masked where they stand: byte b of a lane becomes a float of 256^b times its step, and the sums are divided
// in the end. One instruction masks 8 steps, where widening bytes takes several.
template <int BITS, int G, int L, int WIDTH, int FIRST>  // WIDTH of the chunk's 2 * L vectors at a time, from FIRST on
inline void chunk_product(const float* A, int lda, const uint8_t* chunk, int to_high, const uint32_t* rows, int K,
                          const uint8_t* next, float* C, int ldc) {
  constexpr int W = std::min(WIDTH, 2 * L - FIRST);
  v8f sums[G][W];
  for (int g = 0; g < G; g++)
    for (int w = 0; w < W; w++) sums[g][w] = splat(0.0f);
  for (int k = 0; k < K; k++) {
    const uint8_t* row = chunk + rows[k];
    if (FIRST == 0) __builtin_prefetch(next + rows[k]);
    v8u low{}, high{};
    if (FIRST < L) low = lanes<L>(row);
    if (FIRST + W > L) high = BITS == 5 ? lanes<L>(row + to_high) : lanes<L>(row) >> 4;
    v8f x[W];
    for (int w = 0; w < W; w++) {
      const v8u step = (FIRST + w < L ? low : high) & (((1u << BITS) - 1) << 8 * ((FIRST + w) % L));
      x[w] = __builtin_convertvector(v8i(step), v8f);
    }
    for (int g = 0; g < G; g++) {
      const v8f a = splat(A[g * lda + k]);
      for (int w = 0; w < W; w++) sums[g][w] += a * x[w];
    }
  }
  for (int g = 0; g < G; g++)
    for (int w = 0; w < W; w++) {
      float* at = C + g * ldc + 8 * (FIRST + w);
      store8(at, load8(at) + sums[g][w] * splat(1.0f / float(1u << 8 * ((FIRST + w) % L))));
    }
  if constexpr (FIRST + W < 2 * L)
    chunk_product<BITS, G, L, WIDTH, FIRST + W>(A, lda, chunk, to_high, rows, K, next, C, ldc);
}

template <int BITS, int G, int L>
void chunks_product(const float* A, int lda, const uint8_t* B, const uint32_t* rows, int K, int N,
                    const uint8_t* next, float* C, int ldc) {
  // G * WIDTH sums: enough to hide the latency of an addition, no more than AVX2's 16 registers hold beside the rest
  constexpr int WIDTH = std::min(2 * L, G == 1 ? 8 : G == 2 ? 4 : G == 3 ? 3 : G <= 6 ? 2 : 1);
  for (int j = 0; j < N / 2; j += 8 * L)
    chunk_product<BITS, G, L, WIDTH, 0>(A, lda, B + j, K * N / 2, rows, K, next + j, C + 2 * j, ldc);
}

inline int lane_bytes(int N) { return N % 64 == 0 ? 4 : N % 32 == 0 ? 2 : 1; }

// C[g][n] += sum_k A[g][k] * B[k][n], columns of C in lane order. Row k of B is the N/2 bytes at B + rows[k]: column n
// in the low nibble, n + N/2 in the high one. With BITS 5 B is two planes of bytes, the second of columns from N/2 on.
// Fetches what stands at `next` in rows like B's.
template <int BITS, int G>
void steps_product(const float* A, int lda, const uint8_t* B, const uint32_t* rows, int K, int N,
                   const uint8_t* next, float* C, int ldc) {
  switch (lane_bytes(N)) {
    case 4: chunks_product<BITS, G, 4>(A, lda, B, rows, K, N, next, C, ldc); break;
    case 2: chunks_product<BITS, G, 2>(A, lda, B, rows, K, N, next, C, ldc); break;
    default: chunks_product<BITS, G, 1>(A, lda, B, rows, K, N, next, C, ldc);
  }
}

// Puts N columns in lane order: that of a product's sums, which hold every 1st, 2nd, .. byte of the lanes of a chunk.
template <typename T>
inline void lane_order(const T* from, T* to, int N) {
  const auto reorder = [=](int L) {
    T* at = to;
    for (int chunk = 0; chunk < N / 2; chunk += 8 * L)
      for (int first = chunk; first < N; first += N / 2)
        for (int b = 0; b < L; b++, at += 8)
          for (int i = 0; i < 8; i++) at[i] = from[first + L * i + b];
  };
  if (lane_bytes(N) == 4) reorder(4);
  else reorder(lane_bytes(N));
}

// What the pages of a call share: offsets of the rows of keys, and of values (in lane order, as scores are), in bytes;
// tokens and channels in lane order.
struct Shape {
  int D, P;
  std::vector<uint32_t> key_rows, value_rows, tokens, channels;

  Shape(int D, int P) : D(D), P(P), key_rows(D), value_rows(P), tokens(P), channels(D) {
    std::vector<uint32_t> natural(std::max(D, P));
    std::iota(natural.begin(), natural.end(), 0);
    for (int d = 0; d < D; d++) key_rows[d] = uint32_t(d * P / 2);
    lane_order(natural.data(), tokens.data(), P);
    for (int t = 0; t < P; t++) value_rows[t] = tokens[t] * uint32_t(D / 2);
    lane_order(natural.data(), channels.data(), D);
  }
};

// kernels/page_view.py's PageView, as cpu_pages.py fills it.
struct View {
  const uint8_t *storage, *other;
  int64_t other_slot, payload_bytes;
  const int32_t* table;
  int64_t table_stride;
  const uint16_t* index;
  int64_t index_stride;
  const int32_t* pages;
  int64_t pages_stride;
  const int32_t *begins, *counts, *first;
  int64_t skip, limit, sink_size, origin;  // origin: position of the first token of page 0

  int64_t count(int64_t head) const { return std::clamp<int64_t>(counts[head] - skip, 0, limit); }
  int64_t longest(int64_t heads) const {
    int64_t most = 0;
    for (int64_t head = 0; head < heads; head++) most = std::max(most, count(head));
    return most;
  }
  const int32_t* list(int64_t head) const { return pages + head * pages_stride + begins[head] + skip; }
  const uint8_t* payload(int64_t head, int64_t page) const {
    const int64_t slot = table[head * table_stride + page];
    return slot < other_slot ? storage + slot * payload_bytes : other + (slot - other_slot) * payload_bytes;
  }
};

// Of n tokens in a row, those in [begin, end) are hidden from their head.
struct Hidden {
  int64_t begin, end;
  Hidden(const View& view, int64_t head, int64_t position, int64_t n)
      : begin(std::clamp<int64_t>(view.sink_size - position, 0, n)),
        end(std::clamp<int64_t>(view.first[head] - position, begin, n)) {}
};

// Online softmax state of G queries of one KV head.
struct Running {
  float max[MAX_GROUP], sum[MAX_GROUP];
  float* acc;  // [G][D]
};

// Turns scores [G][n] (n a multiple of 8, padding = -inf) into probabilities against the new running maximum.
inline void softmax_step(Running& run, float* scores, int G, int n, int D) {
  for (int g = 0; g < G; g++) {
    float* s = scores + g * n;
    v8f tops = splat(run.max[g]);
    for (int i = 0; i < n; i += 8) {
      const v8f raw = load8(s + i);
      tops = raw > tops ? raw : tops;
    }
    float top = tops[0];
    for (int i = 1; i < 8; i++) top = std::max(top, tops[i]);
    if (top > run.max[g]) {
      const float shrink = run.sum[g] > 0 ? std::exp(run.max[g] - top) : 0.0f;
      run.sum[g] *= shrink;
      for (int d = 0; d < D; d++) run.acc[g * D + d] *= shrink;
      run.max[g] = top;
    }
    v8f total = splat(0.0f);
    for (int i = 0; i < n; i += 8) {
      const v8f raw = load8(s + i);
      v8f e = exp8(raw - splat(top));
      e = raw < splat(-1e37f) ? splat(0.0f) : e;
      store8(s + i, e);
      total += e;
    }
    run.sum[g] += sum8(total);
  }
}

// Five-bit keys as two planes of a byte a key: once a page, where a product reads its rows several times.
inline void unpack_keys(const uint8_t* keys, const uint8_t* fifths, int size, uint8_t* planes) {
  for (int i = 0; i < size; i += 32) {
    const v8u four = lanes<4>(keys + i), fifth = lanes<4>(fifths + i);
    const v8u low = (four & 0x0f0f0f0f) | ((fifth & 0x08080808) << 1);
    const v8u high = ((four >> 4) & 0x0f0f0f0f) | ((fifth >> 3) & 0x10101010);
    std::memcpy(planes + i, &low, 32);
    std::memcpy(planes + size + i, &high, 32);
  }
}

// Leaves run.acc in lane order. `next` is the payload of the page after this one; at least one token is not hidden.
template <int KEY_BITS, int G>
void quantized_page(Running& run, const float* q, const uint8_t* payload, const uint16_t* index,
                    const uint8_t* next, Hidden hidden, const Shape& shape, float* work) {
  const int D = shape.D, P = shape.P;
  float* scaled = work;             // [G][D], then reused as [G][P]
  const int wide = std::max(D, P);
  float* scores = work + G * wide;  // [G][P]
  float* key_scale = scores + G * P;
  float* key_min = key_scale + D;
  halves_to_floats(index, key_scale, 2 * D);
  for (int g = 0; g < G; g++) {
    const float* qg = q + g * D;
    v8f dot = splat(0.0f);
    for (int d = 0; d < D; d += 8) {
      const v8f x = load8(qg + d);
      store8(scaled + g * D + d, x * load8(key_scale + d));
      dot += x * load8(key_min + d);
    }
    const v8f base = splat(sum8(dot));
    for (int t = 0; t < P; t += 8) store8(scores + g * P + t, base);
  }
  const uint8_t *keys = payload, *values = payload + D * P / 2;
  if (KEY_BITS == 5) {
    uint8_t* planes = reinterpret_cast<uint8_t*>(key_min + wide);
    unpack_keys(keys, values, D * P / 2, planes);
    keys = planes;
  }
  steps_product<KEY_BITS, G>(scaled, D, keys, shape.key_rows.data(), D, P, next, scores, P);
  if (hidden.begin < hidden.end)
    for (int t = 0; t < P; t++)
      if (shape.tokens[t] >= hidden.begin && shape.tokens[t] < hidden.end)
        for (int g = 0; g < G; g++) scores[g * P + t] = NEG_INF;
  softmax_step(run, scores, G, P, D);
  uint16_t scales[512];
  std::memcpy(scales, values + D * P / 2, 4 * P);
  float* value_scale = key_scale;
  float* value_min = key_scale + wide;
  float natural[512];
  halves_to_floats(scales, natural, 2 * P);
  lane_order(natural, value_scale, P);
  lane_order(natural + P, value_min, P);
  for (int g = 0; g < G; g++) {
    v8f base = splat(0.0f);
    for (int t = 0; t < P; t += 8) {
      const v8f p = load8(scores + g * P + t);
      store8(scaled + g * P + t, p * load8(value_scale + t));
      base += p * load8(value_min + t);
    }
    const v8f add = splat(sum8(base));
    for (int d = 0; d < D; d += 8) store8(run.acc + g * D + d, load8(run.acc + g * D + d) + add);
  }
  steps_product<8 - KEY_BITS, G>(scaled, P, values, shape.value_rows.data(), P, D, next + D * P / 2, run.acc, D);
}

inline v8f exact8(const void* base, int64_t at, int itemsize) {
  if (itemsize == 4) return load8(static_cast<const float*>(base) + at);
  v8h raw; std::memcpy(&raw, static_cast<const uint16_t*>(base) + at, 16);
  return bits_as<v8f>(__builtin_convertvector(raw, v8i) << 16);
}

// Attention over n tokens kept exact: k, v [n, D] of one head, bf16 (itemsize 2) or float32 (4).
void exact_run(Running& run, const float* q, int G, const void* k, const void* v, int itemsize, int n, int D, float* work) {
  constexpr int TILE = 64;
  for (int start = 0; start < n; start += TILE) {
    const int count = std::min(TILE, n - start);
    const int padded = (count + 7) / 8 * 8;
    for (int g = 0; g < G; g++)
      for (int t = count; t < padded; t++) work[g * padded + t] = NEG_INF;
    for (int t = 0; t < count; t++)
      for (int g = 0; g < G; g++) {
        v8f dot = splat(0.0f);
        for (int d = 0; d < D; d += 8) dot += load8(q + g * D + d) * exact8(k, int64_t(start + t) * D + d, itemsize);
        work[g * padded + t] = sum8(dot);
      }
    softmax_step(run, work, G, padded, D);
    for (int t = 0; t < count; t++)
      for (int d = 0; d < D; d += 8) {
        const v8f x = exact8(v, int64_t(start + t) * D + d, itemsize);
        for (int g = 0; g < G; g++) {
          float* at = run.acc + g * D + d;
          store8(at, load8(at) + splat(work[g * padded + t]) * x);
        }
      }
  }
}

template <int KEY_BITS>
constexpr decltype(&quantized_page<KEY_BITS, 1>) PAGE_OF_GROUP[MAX_GROUP] = {
    quantized_page<KEY_BITS, 1>, quantized_page<KEY_BITS, 2>, quantized_page<KEY_BITS, 3>, quantized_page<KEY_BITS, 4>,
    quantized_page<KEY_BITS, 5>, quantized_page<KEY_BITS, 6>, quantized_page<KEY_BITS, 7>, quantized_page<KEY_BITS, 8>};

inline void store_as(int64_t itemsize, void* out, int64_t at, float x) {
  if (itemsize == 4) static_cast<float*>(out)[at] = x;
  else static_cast<uint16_t*>(out)[at] = float_to_bf16(x);
}

// Keys and values of one page, token-major, from element `at` on.
template <int KEY_BITS>
void dequantize_page(void* k_out, void* v_out, int64_t at, int64_t out_itemsize, int64_t D, int64_t P,
                     const uint8_t* payload, const uint16_t* scales) {
  const uint8_t* values = payload + D * P / 2;
  float tile[8 * 256];  // 8 channels x P tokens
  for (int64_t d0 = 0; d0 < D; d0 += 8) {
    for (int64_t i = 0; i < 8; i++) {
      const float scale = half_to_float(scales[d0 + i]), minimum = half_to_float(scales[D + d0 + i]);
      const uint8_t* row = payload + (d0 + i) * (P / 2);
      const uint8_t* fifths = values + (d0 + i) * (P / 2);
      for (int64_t t = 0; t < P / 2; t++) {
        const int low = (row[t] & 15) | (KEY_BITS == 5 ? (fifths[t] & 8) << 1 : 0);
        const int high = row[t] >> 4 | (KEY_BITS == 5 ? (fifths[t] & 128) >> 3 : 0);
        tile[i * P + t] = minimum + scale * float(low);
        tile[i * P + P / 2 + t] = minimum + scale * float(high);
      }
    }
    for (int64_t t = 0; t < P; t++)
      for (int64_t i = 0; i < 8; i++) store_as(out_itemsize, k_out, at + t * D + d0 + i, tile[i * P + t]);
  }
  constexpr int mask = KEY_BITS == 5 ? 7 : 15;
  uint16_t value_scales[512];
  std::memcpy(value_scales, values + D * P / 2, 4 * P);
  for (int64_t t = 0; t < P; t++) {
    const float scale = half_to_float(value_scales[t]), minimum = half_to_float(value_scales[P + t]);
    const uint8_t* row = values + t * (D / 2);
    for (int64_t d = 0; d < D / 2; d++) {
      store_as(out_itemsize, v_out, at + t * D + d, minimum + scale * float(row[d] & mask));
      store_as(out_itemsize, v_out, at + t * D + D / 2 + d, minimum + scale * float(row[d] >> 4 & mask));
    }
  }
}

}  // namespace

extern "C" {

// Decode attention of `heads` KV heads, `group` queries each, over the view's pages and two runs of exact tokens;
// kernels/cpu_pages.py has the same fields.
struct Decode {
  View view;
  const void* q;                                  // [heads][group][D], bf16 or float32
  float *out, *lse;                               // [heads][group][D], and log-sum-exp of the scores [heads][group]
  const void *sink_k, *sink_v, *tail_k, *tail_v;  // bf16 or float32 (itemsize 2, 4) [heads][stride elements a head]
  const int32_t* lengths;                         // sink tokens, tail tokens, position of the tail's first token
  int64_t sink_stride, tail_stride, heads, group, D, P, key_bits, itemsize, q_bf16, threads;
  double softmax_scale;
};

void longrun_decode(const Decode* of) {
  const View& view = of->view;
  float *out = of->out, *lse = of->lse;
  const void *sink_k = of->sink_k, *sink_v = of->sink_v, *tail_k = of->tail_k, *tail_v = of->tail_v;
  const int32_t* lengths = of->lengths;
  const int64_t sink_stride = of->sink_stride, tail_stride = of->tail_stride, heads = of->heads, group = of->group;
  const int64_t D = of->D, P = of->P, key_bits = of->key_bits, itemsize = of->itemsize, threads = of->threads;
  std::vector<float> q(size_t(heads * group * D));
  for (size_t i = 0; i < q.size(); i++)
    q[i] = float(of->softmax_scale) * (of->q_bf16 ? bits_as<float>(uint32_t(static_cast<const uint16_t*>(of->q)[i]) << 16)
                                                  : static_cast<const float*>(of->q)[i]);
  const int64_t parts = (group + MAX_GROUP - 1) / MAX_GROUP;
  const int64_t want = std::max<int64_t>(1, (4 * threads + heads * parts - 1) / (heads * parts));
  const int64_t splits = std::max<int64_t>(1, std::min(want, view.longest(heads) / 8));
  const int64_t state = group * (D + 2);  // per (head, split): acc [group][D], max [group], sum [group]
  std::vector<float> partial(size_t(heads * splits * state));
  const Shape shape{int(D), int(P)};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> work(size_t(MAX_GROUP * (std::max(D, P) + std::max<int64_t>(P, 64)) + 2 * std::max(D, P) + 64) +
                            size_t(D * P / 4));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * splits * parts; task++) {
      const int64_t part = task % parts, split = task / parts % splits, head = task / parts / splits;
      const int G = int(std::min<int64_t>(MAX_GROUP, group - part * MAX_GROUP));
      const float* qh = q.data() + (head * group + part * MAX_GROUP) * D;
      float* base = partial.data() + (head * splits + split) * state;
      const auto decode_page = key_bits == 5 ? PAGE_OF_GROUP<5>[G - 1] : PAGE_OF_GROUP<4>[G - 1];
      Running run;
      run.acc = base + part * MAX_GROUP * D;
      std::fill(run.acc, run.acc + G * D, 0.0f);
      for (int g = 0; g < G; g++) run.max[g] = NEG_INF, run.sum[g] = 0;
      const int64_t count = view.count(head), first = count * split / splits, last = count * (split + 1) / splits;
      const int32_t* list = view.list(head);
      for (int64_t e = first; e < last; e++) {
        const int64_t page = list[e];
        const Hidden hidden(view, head, view.origin + page * P, P);
        if (hidden.end - hidden.begin == P) continue;
        decode_page(run, qh, view.payload(head, page), view.index + head * view.index_stride + page * 2 * D,
                    view.payload(head, list[e + 1 < last ? e + 1 : e]), hidden, shape, work.data());
      }
      for (int g = 0; g < G; g++) {
        float* acc = run.acc + g * D;
        std::copy(acc, acc + D, work.data());
        for (int64_t d = 0; d < D; d++) acc[shape.channels[size_t(d)]] = work[size_t(d)];
      }
      const auto exact = [&](const void* k, const void* v, int64_t stride, int64_t n, int64_t position) {
        const Hidden hidden(view, head, position, n);
        const auto attend = [&](int64_t begin, int64_t end) {
          const int64_t at = (head * stride + begin * D) * itemsize;
          exact_run(run, qh, G, static_cast<const char*>(k) + at, static_cast<const char*>(v) + at, int(itemsize),
                    int(end - begin), int(D), work.data());
        };
        if (hidden.begin == hidden.end) return attend(0, n);
        attend(0, hidden.begin);
        attend(hidden.end, n);
      };
      if (split == 0) exact(sink_k, sink_v, sink_stride, lengths[0], 0);
      if (split == splits - 1) exact(tail_k, tail_v, tail_stride, lengths[1], lengths[2]);
      for (int g = 0; g < G; g++) {
        base[group * D + part * MAX_GROUP + g] = run.max[g];
        base[group * D + group + part * MAX_GROUP + g] = run.sum[g];
      }
    }
#pragma omp for
    for (int64_t row = 0; row < heads * group; row++) {
      const int64_t head = row / group, g = row % group;
      const float* base = partial.data() + head * splits * state;
      float top = NEG_INF, sum = 0;
      for (int64_t s = 0; s < splits; s++) top = std::max(top, base[s * state + group * D + g]);
      float* o = out + row * D;
      std::fill(o, o + D, 0.0f);
      for (int64_t s = 0; s < splits; s++) {
        const float part_sum = base[s * state + group * D + group + g];
        if (part_sum == 0) continue;
        const float weight = std::exp(base[s * state + group * D + g] - top);
        sum += weight * part_sum;
        for (int64_t d = 0; d < D; d++) o[d] += weight * base[s * state + g * D + d];
      }
      for (int64_t d = 0; d < D && sum > 0; d++) o[d] /= sum;
      lse[row] = sum > 0 ? top + std::log(sum) : NEG_INF;
    }
  }
}

// Dequantize the view's pages to k, v [heads][out_stride elements a head], token-major, in the order of the lists.
// out_itemsize 4: float32, 2: bf16. Returns pages of the longest list; writes nothing where that is more than `room`.
int64_t longrun_dequantize(void* k_out, void* v_out, int64_t out_stride, int64_t out_itemsize, int64_t room, int64_t heads,
                       int64_t D, int64_t P, int64_t key_bits, const View* of, int64_t threads) {
  const View& view = *of;
  const int64_t longest = view.longest(heads);
  if (longest > room) return longest;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < heads * longest; task++) {
    const int64_t head = task / longest, e = task % longest;
    if (e >= view.count(head)) continue;
    const int64_t page = view.list(head)[e];
    const auto dequantize = key_bits == 5 ? dequantize_page<5> : dequantize_page<4>;
    dequantize(k_out, v_out, head * out_stride + e * P * D, out_itemsize, D, P, view.payload(head, page),
               view.index + head * view.index_stride + page * 2 * D);
  }
  return longest;
}
}
