// Kernels for int4 and k5v3 pages on the CPU: fused split-KV decode attention and page dequantization.
//
// Page layout: see quant/kv_format.py; `key_bits` tells the format, 4 for int4 and 5 for k5v3. Both halves of attention
// are one product of a small float matrix with a nibble matrix, C[g][n] = sum_k A[g][k] * B[k][n]:
//   scores   A = q * key scale (per channel), B = keys [D][P]    (the key minimum adds q . min to every token)
//   output   A = p * value scale (per token), B = values [P][D]  (the value minimum adds sum(p * min) to every channel)
// so that nibbles go from memory to fused multiply-add without a dequantized copy. Partial results of page ranges
// are merged by log-sum-exp (FlashDecoding).
//
// Plain C interface, called through ctypes (kernels/cpu_int4.py). Built for the machine it runs on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));
typedef uint8_t v8b __attribute__((vector_size(8)));
constexpr int MAX_GROUP = 8;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();

inline v8f load8(const float* p) { v8f r; std::memcpy(&r, p, 32); return r; }
inline void store8(float* p, v8f v) { std::memcpy(p, &v, 32); }
inline v8b bytes8(const uint8_t* p) { v8b r; std::memcpy(&r, p, 8); return r; }
inline v8f splat(float x) { return v8f{x, x, x, x, x, x, x, x}; }
inline float sum8(v8f v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16;
  const uint32_t magnitude = h & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    float out; std::memcpy(&out, &bits, 4); return out;
  }
  bits = magnitude << 13;  // exponent still biased by 15; the product rebiases it and is exact for subnormals too
  float out; std::memcpy(&out, &bits, 4);
  out *= 0x1p112f;
  std::memcpy(&bits, &out, 4);
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float out; std::memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t float_to_bf16(float x) {  // round to nearest even; inputs are finite
  uint32_t bits; std::memcpy(&bits, &x, 4);
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
  const v8i scale = (n + 127) << 23;
  v8f s; std::memcpy(&s, &scale, 32);
  return p * s;
}

// Steps of 8 bytes. BITS 4: the nibbles; 3: their lower three bits; 5: bits 3 and 7 of `fifths` on top of them.
template <int BITS>
inline void unpack8(const uint8_t* bytes, const uint8_t* fifths, v8f& low, v8f& high) {
  const v8h both = __builtin_convertvector(bytes8(bytes), v8h);  // in 16 bits: straight to 32, g++ 12 goes in halves
  v8h lo = both & 15, hi = both >> 4;
  if (BITS == 3) {
    lo &= 7;
    hi &= 7;
  }
  if (BITS == 5) {
    const v8h top = __builtin_convertvector(bytes8(fifths), v8h);
    lo |= (top & 8) << 1;
    hi |= (top & 128) >> 3;
  }
  low = __builtin_convertvector(__builtin_convertvector(lo, v8i), v8f);
  high = __builtin_convertvector(__builtin_convertvector(hi, v8i), v8f);
}

// C[g][n] += sum_k A[g][k] * B[k][n], n in [0, N); row k of B is N/2 bytes: n low nibble, n + N/2 high nibble. With
// BITS 5, the bytes after B hold the fifth bits at the same offsets.
template <int BITS, int G, int T>  // T vectors of 8 low and T of 8 high columns at a time
void nibble_product(const float* A, int lda, const uint8_t* B, int K, int N, float* C, int ldc) {
  const int half = N / 2, to_fifths = BITS == 5 ? K * half : 0;
  for (int j = 0; j < half; j += 8 * T) {
    v8f low[G][T], high[G][T];
    for (int g = 0; g < G; g++)
      for (int t = 0; t < T; t++) {
        low[g][t] = load8(C + g * ldc + j + 8 * t);
        high[g][t] = load8(C + g * ldc + half + j + 8 * t);
      }
    const uint8_t* row = B + j;
    for (int k = 0; k < K; k++, row += half) {
      v8f lo[T], hi[T];
      for (int t = 0; t < T; t++) unpack8<BITS>(row + 8 * t, row + to_fifths + 8 * t, lo[t], hi[t]);
      for (int g = 0; g < G; g++) {
        const v8f a = splat(A[g * lda + k]);
        for (int t = 0; t < T; t++) {
          low[g][t] += a * lo[t];
          high[g][t] += a * hi[t];
        }
      }
    }
    for (int g = 0; g < G; g++)
      for (int t = 0; t < T; t++) {
        store8(C + g * ldc + j + 8 * t, low[g][t]);
        store8(C + g * ldc + half + j + 8 * t, high[g][t]);
      }
  }
}

template <int BITS, int G>
void nibble_product_for(const float* A, int lda, const uint8_t* B, int K, int N, float* C, int ldc) {
  if (G <= 3 && N % 32 == 0)  // accumulators: 2 * G * T registers of 16 on AVX2
    nibble_product<BITS, G, 2>(A, lda, B, K, N, C, ldc);
  else
    nibble_product<BITS, G, 1>(A, lda, B, K, N, C, ldc);
}

// Online softmax state of G queries of one KV head.
struct Running {
  float max[MAX_GROUP], sum[MAX_GROUP];
  float* acc;  // [G][D]
};

// Turns scores [G][n] (n a multiple of 8, padding = -inf) into probabilities against the new running maximum.
inline void softmax_step(Running& run, float* scores, int G, int n, int D) {
  for (int g = 0; g < G; g++) {
    float* s = scores + g * n;
    float top = run.max[g];
    for (int i = 0; i < n; i++) top = std::max(top, s[i]);
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

template <int KEY_BITS, int G>
void quantized_page(Running& run, const float* q, const uint8_t* payload, const uint16_t* index, int D, int P,
                    float* work) {
  float* scaled = work;             // [G][D], then reused as [G][P]
  const int wide = std::max(D, P);
  float* scores = work + G * wide;  // [G][P]
  float* key_scale = scores + G * P;
  float* key_min = key_scale + D;
  for (int d = 0; d < D; d++) key_scale[d] = half_to_float(index[d]);
  for (int d = 0; d < D; d++) key_min[d] = half_to_float(index[D + d]);
  for (int g = 0; g < G; g++) {
    float base = 0;
    const float* qg = q + g * D;
    v8f dot = splat(0.0f);
    for (int d = 0; d < D; d += 8) {
      const v8f x = load8(qg + d);
      store8(scaled + g * D + d, x * load8(key_scale + d));
      dot += x * load8(key_min + d);
    }
    base = sum8(dot);
    for (int t = 0; t < P; t += 8) store8(scores + g * P + t, splat(base));
  }
  nibble_product_for<KEY_BITS, G>(scaled, D, payload, D, P, scores, P);
  softmax_step(run, scores, G, P, D);
  const uint8_t* values = payload + (int64_t)D * P / 2;
  uint16_t scales[512];
  std::memcpy(scales, values + (int64_t)D * P / 2, 4 * P);
  float* value_scale = key_scale;
  float* value_min = key_scale + wide;
  for (int t = 0; t < P; t++) value_scale[t] = half_to_float(scales[t]);
  for (int t = 0; t < P; t++) value_min[t] = half_to_float(scales[P + t]);
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
  nibble_product_for<8 - KEY_BITS, G>(scaled, P, values, P, D, run.acc, D);
}

inline v8f exact8(const void* base, int64_t at, int itemsize) {
  if (itemsize == 4) return load8(static_cast<const float*>(base) + at);
  v8h raw; std::memcpy(&raw, static_cast<const uint16_t*>(base) + at, 16);
  const v8i wide = __builtin_convertvector(raw, v8i) << 16;
  v8f out; std::memcpy(&out, &wide, 32);
  return out;
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
void page_dispatch(Running& run, int G, const float* q, const uint8_t* payload, const uint16_t* index, int D, int P,
                   float* work) {
  switch (G) {
    case 1: quantized_page<KEY_BITS, 1>(run, q, payload, index, D, P, work); break;
    case 2: quantized_page<KEY_BITS, 2>(run, q, payload, index, D, P, work); break;
    case 3: quantized_page<KEY_BITS, 3>(run, q, payload, index, D, P, work); break;
    case 4: quantized_page<KEY_BITS, 4>(run, q, payload, index, D, P, work); break;
    case 5: quantized_page<KEY_BITS, 5>(run, q, payload, index, D, P, work); break;
    case 6: quantized_page<KEY_BITS, 6>(run, q, payload, index, D, P, work); break;
    case 7: quantized_page<KEY_BITS, 7>(run, q, payload, index, D, P, work); break;
    default: quantized_page<KEY_BITS, 8>(run, q, payload, index, D, P, work); break;
  }
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
      for (int64_t i = 0; i < 8; i++) {
        if (out_itemsize == 4) static_cast<float*>(k_out)[at + t * D + d0 + i] = tile[i * P + t];
        else static_cast<uint16_t*>(k_out)[at + t * D + d0 + i] = float_to_bf16(tile[i * P + t]);
      }
  }
  constexpr int mask = KEY_BITS == 5 ? 7 : 15;
  uint16_t value_scales[512];
  std::memcpy(value_scales, values + D * P / 2, 4 * P);
  for (int64_t t = 0; t < P; t++) {
    const float scale = half_to_float(value_scales[t]), minimum = half_to_float(value_scales[P + t]);
    const uint8_t* row = values + t * (D / 2);
    for (int64_t d = 0; d < D / 2; d++) {
      const float low = minimum + scale * float(row[d] & mask), high = minimum + scale * float(row[d] >> 4 & mask);
      if (out_itemsize == 4) {
        static_cast<float*>(v_out)[at + t * D + d] = low;
        static_cast<float*>(v_out)[at + t * D + D / 2 + d] = high;
      } else {
        static_cast<uint16_t*>(v_out)[at + t * D + d] = float_to_bf16(low);
        static_cast<uint16_t*>(v_out)[at + t * D + D / 2 + d] = float_to_bf16(high);
      }
    }
  }
}

}  // namespace

extern "C" {

// Decode attention of `heads` KV heads, `group` queries each, over pages [0, num_pages) and two runs of exact tokens.
//   q, out    float32 [heads, group, D]; q already times softmax_scale
//   lse       float32 [heads, group]: natural-log-sum-exp of the scores; -inf where there was no token at all
//   pool      pages of payload_bytes; table int32 [heads][table_stride] gives the slot of each page
//   index     float16 [heads][index_stride] elements: 2 * D a page
//   exact_*   bf16 or float32 (itemsize 2, 4) [heads][exact_stride elements a head], first exact_n tokens of each
void longrun_decode(const float* q, float* out, float* lse, int64_t heads, int64_t group, int64_t D, int64_t P,
                    int64_t key_bits, const uint8_t* pool, int64_t payload_bytes, const int32_t* table,
                    int64_t table_stride, const uint16_t* index, int64_t index_stride, int64_t num_pages,
                    const void* exact0_k, const void* exact0_v, int64_t exact0_stride, int64_t exact0_n,
                    const void* exact1_k, const void* exact1_v, int64_t exact1_stride, int64_t exact1_n,
                    int64_t itemsize, int64_t threads) {
  const int64_t parts = (group + MAX_GROUP - 1) / MAX_GROUP;
  const int64_t want = std::max<int64_t>(1, (4 * threads + heads * parts - 1) / (heads * parts));
  const int64_t splits = std::max<int64_t>(1, std::min(want, num_pages / 8));
  const int64_t state = group * (D + 2);  // per (head, split): acc [group][D], max [group], sum [group]
  std::vector<float> partial(size_t(heads * splits * state));
  const auto decode_page = key_bits == 5 ? page_dispatch<5> : page_dispatch<4>;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> work(size_t(MAX_GROUP * (std::max(D, P) + std::max<int64_t>(P, 64)) + 2 * std::max(D, P) + 64));
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * splits * parts; task++) {
      const int64_t part = task % parts, split = task / parts % splits, head = task / parts / splits;
      const int G = int(std::min<int64_t>(MAX_GROUP, group - part * MAX_GROUP));
      const float* qh = q + (head * group + part * MAX_GROUP) * D;
      float* base = partial.data() + (head * splits + split) * state;
      Running run;
      run.acc = base + part * MAX_GROUP * D;
      std::fill(run.acc, run.acc + G * D, 0.0f);
      for (int g = 0; g < G; g++) run.max[g] = NEG_INF, run.sum[g] = 0;
      const int64_t first = num_pages * split / splits, last = num_pages * (split + 1) / splits;
      for (int64_t page = first; page < last; page++) {
        const int64_t slot = table[head * table_stride + page];
        decode_page(run, G, qh, pool + slot * payload_bytes, index + head * index_stride + page * 2 * D, int(D), int(P),
                      work.data());
      }
      if (split == 0 && exact0_n > 0)
        exact_run(run, qh, G, static_cast<const char*>(exact0_k) + head * exact0_stride * itemsize,
                  static_cast<const char*>(exact0_v) + head * exact0_stride * itemsize, int(itemsize), int(exact0_n),
                  int(D), work.data());
      if (split == splits - 1 && exact1_n > 0)
        exact_run(run, qh, G, static_cast<const char*>(exact1_k) + head * exact1_stride * itemsize,
                  static_cast<const char*>(exact1_v) + head * exact1_stride * itemsize, int(itemsize), int(exact1_n),
                  int(D), work.data());
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

// Dequantize pages [first, first + count) of every head to k, v [heads][out_stride elements a head], token-major.
// out_itemsize 4: float32, 2: bf16.
void longrun_dequantize(void* k_out, void* v_out, int64_t out_stride, int64_t out_itemsize, int64_t heads, int64_t D,
                        int64_t P, int64_t key_bits, const uint8_t* pool, int64_t payload_bytes, const int32_t* table,
                        int64_t table_stride, const uint16_t* index, int64_t index_stride, int64_t first, int64_t count,
                        int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < heads * count; task++) {
    const int64_t head = task / count, page = task % count;
    const uint8_t* payload = pool + int64_t(table[head * table_stride + first + page]) * payload_bytes;
    const uint16_t* scales = index + head * index_stride + (first + page) * 2 * D;
    const int64_t at = head * out_stride + page * P * D;
    const auto dequantize = key_bits == 5 ? dequantize_page<5> : dequantize_page<4>;
    dequantize(k_out, v_out, at, out_itemsize, D, P, payload, scales);
  }
}

int longrun_cpu_version() { return 1; }
}
