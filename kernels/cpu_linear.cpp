// Linear layers for one to four tokens on the CPU, straight from the stored weight: RMS norm before; bias, SwiGLU gate
// and residual after. Weights are read once, as they lie, and multiplied as float32; nothing is dequantized to memory.
//
// int4, nf4: a lane is a word, eight consecutive weights of a row. Nibble n of every lane is one vector; the activations
// are put in that order before. int4 nibbles are masked where they stand, as 16^n times their value, and activations are
// 16^-n times theirs: mask, conversion, multiply-add for a vector of weights. That nibbles stand 8 too high is taken off
// the start of every lane's sum; the sum is multiplied by the step of the lane's group. nf4 looks its values up.
// int8, bf16, fp32: weights in order, widened to float.
//
// A row is summed in a fixed order by one thread: results do not depend on the number of threads.
//
// Plain C interface, called through ctypes (kernels/cpu_linear.py). Built for the machine it runs on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
constexpr int MAX_TOKENS = 4;
constexpr int AHEAD = 4096;  // bytes fetched ahead: rows lie one behind the other, short ones give no pattern to follow
enum Format : int64_t { FP32, BF16, INT8, NF4, INT4 };

template <int N> struct Lanes;
template <> struct Lanes<8> {
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint64_t L __attribute__((vector_size(32)));
  typedef uint16_t H __attribute__((vector_size(16)));
  typedef int8_t B __attribute__((vector_size(8)));
};
template <> struct Lanes<16> {
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef uint64_t L __attribute__((vector_size(64)));
  typedef uint16_t H __attribute__((vector_size(32)));
  typedef int8_t B __attribute__((vector_size(16)));
};
template <int N> using F = typename Lanes<N>::F;
template <int N> using I = typename Lanes<N>::I;
template <int N> using U = typename Lanes<N>::U;
template <int N> using L = typename Lanes<N>::L;

template <typename V>
inline V load(const void* p) { V v; std::memcpy(&v, p, sizeof(V)); return v; }

template <typename To, typename From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out; std::memcpy(&out, &x, sizeof(To));
  return out;
}

inline float sum(F<8> v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
inline float sum(F<16> v) {
  F<8> halves[2];
  std::memcpy(halves, &v, 64);
  return sum(halves[0] + halves[1]);
}

inline float bf16_to_float(uint16_t x) { return bits_as<float>(uint32_t(x) << 16); }
inline uint16_t float_to_bf16(float x) {  // to nearest even
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float read(const void* base, int64_t at, bool bf16) {
  return bf16 ? bf16_to_float(static_cast<const uint16_t*>(base)[at]) : static_cast<const float*>(base)[at];
}

// A linear as `QuantLinear` holds it, and what stands around it; kernels/cpu_linear.py has the same fields.
struct Call {
  const uint8_t* weight;   // rows of row_bytes
  const uint8_t* scale;    // int8: float32 a row; int4: bf16 a group of 32; nf4: float32 a group of 64
  const float* code;       // nf4: 16 values
  const void* bias;        // or null; bias, norm, x and out are bf16 or float32
  const void* norm;        // or null
  const void* x;           // [tokens][x_stride]
  void* out;               // [tokens][out_stride]
  int64_t format, bf16, in_features, num_outputs, gated, accumulate, tokens, x_stride, out_stride, threads;
  double eps;
};

// Lanes that a step of the product takes where `left` are left: whole wide vectors, then narrow ones, the last of them
// filled up with zeros.
inline int step_lanes(int64_t left) { return left >= WIDE ? WIDE : 8; }

// What the packed formats multiply with: activations in the order of their nibbles, and where a lane's sum starts.
struct Prepared {
  std::vector<float> x, start;
  int64_t stride = 0, lanes = 0;  // of a token, filled up

  void pack(const float* row, int64_t in_features, int64_t token, bool int4) {
    float* to = x.data() + token * stride;
    const int64_t words = (in_features + 7) / 8;
    for (int64_t lane = 0, n; lane < words; lane += n) {
      n = step_lanes(words - lane);
      for (int64_t i = 0; i < n; i++) {
        float total = 0;
        for (int nibble = 0; nibble < 8; nibble++) {
          const int weight = int4 ? nibble / 2 + 4 * (nibble & 1) : nibble ^ 1;
          const int64_t at = (lane + i) * 8 + weight;
          const float value = at < in_features ? row[at] : 0.0f;
          total += value;
          const bool shifted = !int4 || nibble == 7;  // the highest would be a sign
          to[nibble * n + i] = shifted ? value : value * (1.0f / float(1u << 4 * nibble));
        }
        start[size_t(token * lanes + lane + i)] = -8 * total;
      }
      to += 8 * n;
    }
  }
};

template <int N>
inline F<N> look_up(const float* code, U<N> words, int nibble) {
  const U<N> index = words >> 4 * nibble;
#ifdef __AVX512F__
  if constexpr (N == 16)
    return bits_as<F<16>>(_mm512_permutexvar_ps(bits_as<__m512i>(index), _mm512_loadu_ps(code)));
#endif
#ifdef __AVX2__
  if constexpr (N == 8) {
    const __m256i at = bits_as<__m256i>(index);
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code), at);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(code + 8), at);
    return bits_as<F<8>>(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28))));
  }
#endif
  F<N> found;
  for (int i = 0; i < N; i++) found[i] = code[index[i] & 15];
  return found;
}

template <int64_t FORMAT, int N>
inline F<N> nibbles(U<N> words, int n, const float* code) {
  if constexpr (FORMAT == NF4) return look_up<N>(code, words, n);
  const U<N> steps = n == 7 ? words >> 28 : words & (15u << 4 * n);
  return __builtin_convertvector(bits_as<I<N>>(steps), F<N>);
}

// The steps of the groups that N lanes belong to: four lanes a group (int4), or eight (nf4).
template <int64_t FORMAT, int N>
inline F<N> lane_scales(const uint8_t* scale) {
  if constexpr (FORMAT == NF4) {
    const float first = load<float>(scale), last = N == 16 ? load<float>(scale + 4) : first;
    F<N> all = F<N>{} + first;
    if constexpr (N == 16)
      for (int i = 8; i < 16; i++) all[i] = last;
    return all;
  } else {
    // bf16 to the upper half of both lanes of every pair of lanes
    L<N> high;
    if constexpr (N == 16) high = (L<N>{} + load<uint64_t>(scale)) << L<N>{48, 48, 32, 32, 16, 16, 0, 0};
    else high = (L<N>{} + uint64_t(load<uint32_t>(scale))) << L<N>{48, 48, 32, 32};
    high &= 0xffff000000000000u;
    return bits_as<F<N>>(high | high >> 32);
  }
}

// Adds the products of N lanes of ROWS rows: words and scales of row r from r * (row, scale_row) bytes on.
template <int64_t FORMAT, int N, int ROWS, int TOKENS>
inline void packed_step(const uint8_t* words, int64_t row, const uint8_t* scales, int64_t scale_row, const float* code,
                        const float* x, int64_t x_stride, const float* start, int64_t start_stride,
                        F<N> (&totals)[ROWS][TOKENS]) {
  U<N> w[ROWS];
  F<N> sums[ROWS][TOKENS];
  for (int r = 0; r < ROWS; r++) {
    __builtin_prefetch(words + r * row + AHEAD);
    w[r] = load<U<N>>(words + r * row);
    for (int t = 0; t < TOKENS; t++) sums[r][t] = FORMAT == INT4 ? load<F<N>>(start + t * start_stride) : F<N>{};
  }
#pragma GCC unroll 8
  for (int n = 0; n < 8; n++) {
    F<N> a[TOKENS];
    for (int t = 0; t < TOKENS; t++) a[t] = load<F<N>>(x + t * x_stride + n * N);
    for (int r = 0; r < ROWS; r++) {
      const F<N> value = nibbles<FORMAT, N>(w[r], n, code);
      for (int t = 0; t < TOKENS; t++) sums[r][t] += value * a[t];
    }
  }
  for (int r = 0; r < ROWS; r++) {
    const F<N> scale = lane_scales<FORMAT, N>(scales + r * scale_row);
    for (int t = 0; t < TOKENS; t++) totals[r][t] += scale * sums[r][t];
  }
}

template <int64_t FORMAT, int ROWS, int TOKENS>
void packed_rows(const Call& call, const Prepared& ready, int64_t first, float* out /* [ROWS][TOKENS] */) {
  constexpr int GROUP_LANES = FORMAT == INT4 ? 4 : 8, SCALE_BYTES = FORMAT == INT4 ? 2 : 4;
  const int64_t lanes = (call.in_features + 7) / 8, row = lanes * 4;
  const int64_t scale_row = (lanes + GROUP_LANES - 1) / GROUP_LANES * SCALE_BYTES;
  const uint8_t* words = call.weight + first * row;
  const uint8_t* scales = call.scale + first * scale_row;
  const float *x = ready.x.data(), *start = ready.start.data();
  F<WIDE> wide[ROWS][TOKENS] = {};
  F<8> narrow[ROWS][TOKENS] = {};
  int64_t lane = 0;
  const auto step = [&](auto& totals, auto width, const uint8_t* w, int64_t w_row, const uint8_t* s, int64_t s_row) {
    constexpr int N = decltype(width)::value;
    packed_step<FORMAT, N, ROWS, TOKENS>(w, w_row, s, s_row, call.code, x + lane * 8, ready.stride, start + lane,
                                         ready.lanes, totals);
    lane += N;
  };
  while (lanes - lane >= WIDE)
    step(wide, std::integral_constant<int, WIDE>{}, words + lane * 4, row, scales + lane / GROUP_LANES * SCALE_BYTES,
         scale_row);
  while (lanes - lane >= 8)
    step(narrow, std::integral_constant<int, 8>{}, words + lane * 4, row, scales + lane / GROUP_LANES * SCALE_BYTES,
         scale_row);
  if (lane < lanes) {
    uint8_t last[ROWS][32] = {}, last_scales[ROWS][8] = {};
    const int64_t at = lane / GROUP_LANES * SCALE_BYTES;
    for (int r = 0; r < ROWS; r++) {
      std::memcpy(last[r], words + r * row + lane * 4, size_t(row - lane * 4));
      std::memcpy(last_scales[r], scales + r * scale_row + at, size_t(scale_row - at));
    }
    step(narrow, std::integral_constant<int, 8>{}, last[0], 32, last_scales[0], 8);
  }
  for (int r = 0; r < ROWS; r++)
    for (int t = 0; t < TOKENS; t++) out[r * TOKENS + t] = sum(wide[r][t]) + sum(narrow[r][t]);
}

template <int64_t FORMAT, int N>
inline F<N> widened(const uint8_t* at) {
  if constexpr (FORMAT == FP32) return load<F<N>>(at);
  if constexpr (FORMAT == BF16)
    return bits_as<F<N>>(__builtin_convertvector(load<typename Lanes<N>::H>(at), U<N>) << 16);
#ifdef __AVX512F__
  if constexpr (FORMAT == INT8 && N == 16)
    return bits_as<F<16>>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(at))));
#endif
#ifdef __AVX2__
  if constexpr (FORMAT == INT8 && N == 8)
    return bits_as<F<8>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at))));
#endif
  return __builtin_convertvector(load<typename Lanes<N>::B>(at), F<N>);
}

template <int64_t FORMAT, int ROWS, int TOKENS>
void plain_rows(const Call& call, const Prepared& ready, int64_t first, float* out /* [ROWS][TOKENS] */) {
  constexpr int N = WIDE;
  constexpr int SIZE = FORMAT == FP32 ? 4 : FORMAT == BF16 ? 2 : 1;
  const int64_t K = call.in_features, row = K * SIZE, whole = K / N * N;
  const uint8_t* weights = call.weight + first * row;
  const float* x = ready.x.data();
  F<N> totals[2][ROWS][TOKENS] = {};
  const auto step = [&](int64_t k, int part, const uint8_t* w, int64_t w_row) {
    F<N> a[TOKENS];
    for (int t = 0; t < TOKENS; t++) a[t] = load<F<N>>(x + t * ready.stride + k);
    for (int r = 0; r < ROWS; r++) {
      if (part == 0) __builtin_prefetch(w + r * w_row + AHEAD);
      const F<N> value = widened<FORMAT, N>(w + r * w_row);
      for (int t = 0; t < TOKENS; t++) totals[part][r][t] += value * a[t];
    }
  };
  int64_t k = 0;
  for (; k + 2 * N <= whole; k += 2 * N) {
    step(k, 0, weights + k * SIZE, row);
    step(k + N, 1, weights + (k + N) * SIZE, row);
  }
  if (k < whole) step(k, 0, weights + k * SIZE, row);
  if (whole < K) {
    uint8_t last[ROWS][N * SIZE] = {};
    for (int r = 0; r < ROWS; r++) std::memcpy(last[r], weights + r * row + whole * SIZE, size_t((K - whole) * SIZE));
    step(whole, 1, last[0], N * SIZE);
  }
  for (int r = 0; r < ROWS; r++) {
    const float scale = FORMAT == INT8 ? load<float>(call.scale + (first + r) * 4) : 1.0f;
    for (int t = 0; t < TOKENS; t++) out[r * TOKENS + t] = scale * sum(totals[0][r][t] + totals[1][r][t]);
  }
}

// nf4 rows that begin in the middle of a word or a group: groups count through the whole matrix.
template <int TOKENS>
void unaligned_nf4_row(const Call& call, const Prepared& ready, int64_t row, float* out) {
  double totals[TOKENS] = {};
  for (int64_t k = 0; k < call.in_features; k++) {
    const int64_t at = row * call.in_features + k;
    const int nibble = call.weight[at / 2] >> (at % 2 ? 0 : 4) & 15;
    const float value = call.code[nibble] * load<float>(call.scale + at / 64 * 4);
    for (int t = 0; t < TOKENS; t++) totals[t] += value * ready.x[size_t(t * ready.stride + k)];
  }
  for (int t = 0; t < TOKENS; t++) out[t] = float(totals[t]);
}

inline bool is_packed(const Call& call) { return call.format == INT4 || (call.format == NF4 && call.in_features % 64 == 0); }

template <int ROWS, int TOKENS>
void rows_product(const Call& call, const Prepared& ready, int64_t first, float* out) {
  switch (call.format) {
    case FP32: return plain_rows<FP32, ROWS, TOKENS>(call, ready, first, out);
    case BF16: return plain_rows<BF16, ROWS, TOKENS>(call, ready, first, out);
    case INT8: return plain_rows<INT8, ROWS, TOKENS>(call, ready, first, out);
    case INT4: return packed_rows<INT4, ROWS, TOKENS>(call, ready, first, out);
    default:
      if (is_packed(call)) return packed_rows<NF4, ROWS, TOKENS>(call, ready, first, out);
      for (int r = 0; r < ROWS; r++) unaligned_nf4_row<TOKENS>(call, ready, first + r, out + r * TOKENS);
  }
}

// Outputs first .. first + ROWS of every token, from their rows (gated: their gate rows and their up rows).
template <int ROWS, int TOKENS>
void outputs(const Call& call, const Prepared& ready, int64_t first) {
  float found[2][ROWS * TOKENS];
  for (int half = 0; half < 1 + int(call.gated); half++) {
    const int64_t row = first + half * call.num_outputs;
    rows_product<ROWS, TOKENS>(call, ready, row, found[half]);
    for (int i = 0; call.bias && i < ROWS * TOKENS; i++) found[half][i] += read(call.bias, row + i / TOKENS, call.bf16);
  }
  for (int i = 0; i < ROWS * TOKENS; i++) {
    float value = found[0][i];
    if (call.gated) value = value / (1 + std::exp(-value)) * found[1][i];
    const int64_t at = i % TOKENS * call.out_stride + first + i / TOKENS;
    if (call.accumulate) value += read(call.out, at, call.bf16);
    if (call.bf16) static_cast<uint16_t*>(call.out)[at] = float_to_bf16(value);
    else static_cast<float*>(call.out)[at] = value;
  }
}

template <int TOKENS>
void share(const Call& call, const Prepared& ready, int64_t begin, int64_t end) {
  constexpr int ROWS = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  int64_t first = begin;
  for (; first + ROWS <= end; first += ROWS) outputs<ROWS, TOKENS>(call, ready, first);
  for (; first < end; first++) outputs<1, TOKENS>(call, ready, first);
}

Prepared prepare(const Call& call) {
  const int64_t K = call.in_features;
  const bool packed = is_packed(call);
  Prepared ready;
  ready.lanes = (K + 63) / 64 * 8;
  ready.stride = ready.lanes * 8;
  ready.x.assign(size_t(ready.stride * call.tokens), 0.0f);
  if (packed) ready.start.assign(size_t(ready.lanes * call.tokens), 0.0f);
  std::vector<float> row(static_cast<size_t>(K));
  for (int64_t t = 0; t < call.tokens; t++) {
    for (int64_t k = 0; k < K; k++) row[size_t(k)] = read(call.x, t * call.x_stride + k, call.bf16);
    if (call.norm) {
      F<8> squares[4] = {};
      double rest = 0;
      int64_t k = 0;
      for (; k + 32 <= K; k += 32)
        for (int i = 0; i < 4; i++) {
          const F<8> v = load<F<8>>(row.data() + k + 8 * i);
          squares[i] += v * v;
        }
      for (; k < K; k++) rest += double(row[size_t(k)]) * row[size_t(k)];
      const double square = rest + sum(squares[0] + squares[1]) + sum(squares[2] + squares[3]);
      const float factor = float(1 / std::sqrt(square / double(K) + call.eps));
      for (k = 0; k < K; k++) {
        const float value = row[size_t(k)] * factor * read(call.norm, k, call.bf16);
        row[size_t(k)] = call.bf16 ? bf16_to_float(float_to_bf16(value)) : value;
      }
    }
    if (packed) ready.pack(row.data(), K, t, call.format == INT4);
    else std::copy(row.begin(), row.end(), ready.x.begin() + t * ready.stride);
  }
  return ready;
}

}  // namespace

extern "C" {

void longrun_linear(const Call* given) {
  const Call& call = *given;
  const Prepared ready = prepare(call);
  constexpr int64_t PIECE = 4;  // a thread begins at a multiple of the rows that are worked on together
  const int64_t pieces = (call.num_outputs + PIECE - 1) / PIECE;
#pragma omp parallel num_threads(call.threads)
  {
#ifdef _OPENMP
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
#else
    const int64_t thread = 0, threads = 1;
#endif
    const int64_t begin = pieces * thread / threads * PIECE;
    const int64_t end = std::min(pieces * (thread + 1) / threads * PIECE, call.num_outputs);
    switch (call.tokens) {
      case 1: share<1>(call, ready, begin, end); break;
      case 2: share<2>(call, ready, begin, end); break;
      case 3: share<3>(call, ready, begin, end); break;
      default: share<MAX_TOKENS>(call, ready, begin, end);
    }
  }
}

}
