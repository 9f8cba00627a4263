// One token's head norms, RoPE, rotation and append on the CPU: from the fused projection into q, tails and rings; and
// the rotation of attention's output back. See kernels/rope_store.py and quant/rotation.py for what is computed.
//
// Plain C interface, called through ctypes (kernels/cpu_rope_store.py). Built for the machine it runs on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

inline float bf16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out; std::memcpy(&out, &bits, 4);
  return out;
}
inline uint16_t float_to_bf16(float x) {  // to nearest even
  uint32_t bits; std::memcpy(&bits, &x, 4);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float read(const void* base, int64_t at, bool bf16) {
  return bf16 ? bf16_to_float(static_cast<const uint16_t*>(base)[at]) : static_cast<const float*>(base)[at];
}
inline void write(void* base, int64_t at, float x, bool bf16) {
  if (bf16) static_cast<uint16_t*>(base)[at] = float_to_bf16(x);
  else static_cast<float*>(base)[at] = x;
}
inline void round_to(float* x, int64_t n, bool bf16) {
  for (int64_t i = 0; bf16 && i < n; i++) x[i] = bf16_to_float(float_to_bf16(x[i]));
}

// x [D] times Sylvester's Hadamard matrix of `block` rows, block by block.
void hadamard(float* x, int64_t D, int64_t block) {
  for (int64_t half = 1; half < block; half *= 2)
    for (int64_t first = 0; first < D; first += 2 * half)
      for (int64_t i = first; i < first + half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

void rotate(float* x, int64_t D, const float* signs, float scale, bool bf16) {
  for (int64_t i = 0; i < D; i++) x[i] *= signs[i] * scale;
  hadamard(x, D, D & -D);
  round_to(x, D, bf16);
}

}  // namespace

extern "C" {

// Fields as in kernels/cpu_rope_store.py; pointers may be null as its arguments may be None.
struct Token {
  const void *qkv, *q_norm, *k_norm;   // bf16 or float32, as q_out
  const float *cos, *sin, *signs;
  void *q_out, *tail_k, *tail_v, *ring_k, *ring_v;
  const int64_t* slots;                // in tail and ring
  int64_t bf16, cache_bf16, D, num_qo_heads, retrieval, streaming, tail_stride, ring_stride;
  int64_t rotate_values;
  double eps;
  float query_scale, key_scale;
};

void longrun_rope_store(const Token* given) {
  const Token& token = *given;
  const int64_t D = token.D, half = D / 2, kv_heads = token.retrieval + token.streaming;
  const int64_t rotated_qo = token.num_qo_heads / kv_heads * token.retrieval;
  std::vector<float> x(static_cast<size_t>(D)), turned(static_cast<size_t>(D));
  for (int64_t head = 0; head < token.num_qo_heads + 2 * kv_heads; head++) {
    const bool query = head < token.num_qo_heads, value = head >= token.num_qo_heads + kv_heads;
    for (int64_t i = 0; i < D; i++) x[size_t(i)] = read(token.qkv, head * D + i, token.bf16);
    const void* norm = query ? token.q_norm : value ? nullptr : token.k_norm;
    if (norm) {
      double square = 0;
      for (int64_t i = 0; i < D; i++) square += double(x[size_t(i)]) * x[size_t(i)];
      const float factor = float(1 / std::sqrt(square / double(D) + token.eps));
      for (int64_t i = 0; i < D; i++) x[size_t(i)] *= factor * read(norm, i, token.bf16);
      round_to(x.data(), D, token.bf16);
    }
    if (!value) {
      for (int64_t i = 0; i < half; i++) {
        const float low = x[size_t(i)], high = x[size_t(i + half)];
        turned[size_t(i)] = low * token.cos[i] - high * token.sin[i];
        turned[size_t(i + half)] = high * token.cos[i] + low * token.sin[i];
      }
      x.swap(turned);
      round_to(x.data(), D, token.bf16);
    }
    const int64_t kv = (head - token.num_qo_heads) % kv_heads;
    if (token.signs && (query ? head < rotated_qo : kv < token.retrieval && (!value || token.rotate_values)))
      rotate(x.data(), D, token.signs, query ? token.query_scale : token.key_scale, token.bf16);
    if (query) {
      for (int64_t i = 0; i < D; i++) write(token.q_out, head * D + i, x[size_t(i)], token.bf16);
      continue;
    }
    const bool tail = kv < token.retrieval;
    void* to = tail ? (value ? token.tail_v : token.tail_k) : (value ? token.ring_v : token.ring_k);
    const int64_t at = tail ? kv * token.tail_stride + token.slots[0] * D
                            : (kv - token.retrieval) * token.ring_stride + token.slots[1] * D;
    for (int64_t i = 0; i < D; i++) write(to, at + i, x[size_t(i)], token.cache_bf16);
  }
}

// found [rows][D], float32, to out, bf16 or float32: the first `rotated` rows times the transposed matrix for queries.
void longrun_unrotate(const float* found, const float* signs, void* out, int64_t bf16, int64_t rows, int64_t rotated,
                      int64_t D, float query_scale) {
  std::vector<float> x(static_cast<size_t>(D));
  for (int64_t row = 0; row < rows; row++) {
    std::copy(found + row * D, found + (row + 1) * D, x.begin());
    if (row < rotated) {
      hadamard(x.data(), D, D & -D);
      for (int64_t i = 0; i < D; i++) x[size_t(i)] *= signs[i] * query_scale;
    }
    for (int64_t i = 0; i < D; i++) write(out, row * D + i, x[size_t(i)], bf16);
  }
}

}
