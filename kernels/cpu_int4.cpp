// Quantizing weights to int4: for every 32 of a row the step with the least squared error out of a list of tries, and
// the nearest multiples of it, packed. The steps, one by one and in the same order, are those of quant/int4_weight.py,
// whose comments say why; nothing here may be contracted or reordered, so that both give the same bits.
//
// A lane is a group of 32: 16 or 8 groups at a time, turned so that weight j of all of them is one vector.
//
// Plain C interface, called through ctypes (kernels/cpu_int4.py). Built for the machine it runs on.

#include <algorithm>
#include <cstdint>
#include <cstring>
namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int GROUP = 32, WORD = 8;
typedef float F __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: added, it leaves a small number rounded to even in the low bits

inline I bits_of(F x) { I out; std::memcpy(&out, &x, sizeof out); return out; }
inline F float_of(I x) { F out; std::memcpy(&out, &x, sizeof out); return out; }
inline F clamped(F x) {  // NaN stays
  x = x < -8.0f ? F{} - 8.0f : x;
  return x > 7.0f ? F{} + 7.0f : x;
}

inline F to_bf16(F x) {  // to nearest even, widened again
  const I bits = bits_of(x);
  const F rounded = float_of((bits + 0x7fff + ((bits >> 16) & 1)) & int32_t(0xffff0000));
  return x != x ? x : rounded;
}

struct Sums { F cross, square; };

// What weights J, J + STRIDE, J + 2 * STRIDE, ... add: halves of the group are added, then halves of that, as torch does.
template <int J, int STRIDE>
inline Sums sums(const F* unit, F factor) {
  if constexpr (STRIDE == GROUP) {
    const F code = (clamped(unit[J] * factor) + ROUND) - ROUND;
    return {code * unit[J], code * code};
  } else {
    const Sums a = sums<J, 2 * STRIDE>(unit, factor), b = sums<J + STRIDE, 2 * STRIDE>(unit, factor);
    return {a.cross + b.cross, a.square + b.square};
  }
}

F best_step(const F* weight, const float* factors, int64_t tries) {
  F largest = weight[0], magnitude = largest < 0.0f ? -largest : largest;
  I finite = largest == largest;
  for (int j = 1; j < GROUP; j++) {
    const F size = weight[j] < 0.0f ? -weight[j] : weight[j];
    largest = size > magnitude ? weight[j] : largest;
    magnitude = size > magnitude ? size : magnitude;
    finite &= weight[j] == weight[j];
  }
  largest = finite ? largest : F{} + __builtin_nanf("");
  const F divisor = largest == 0.0f ? F{} + 1.0f : largest;
  F unit[GROUP];
  for (int j = 0; j < GROUP; j++) unit[j] = weight[j] / divisor;
  F best = to_bf16(largest / -8.0f), least = F{} - __builtin_inff();
  for (int64_t i = 0; i < tries; i++) {
    const Sums found = sums<0, 1>(unit, F{} + factors[i]);
    const F step = to_bf16(found.cross / found.square * largest);
    const F ratio = step / largest;
    const F gain = ratio * (2.0f * found.cross - ratio * found.square);
    best = gain > least ? step : best;
    least = gain > least ? gain : least;
  }
  return best;
}

// The 16 bytes of every lane's codes, as four words.
void pack(const F* weight, F step, I* words) {
  const F divisor = step == 0.0f ? F{} + 1.0f : step;
  for (int k = 0; k < GROUP / WORD; k++) {
    words[k] = I{};
    for (int j = 0; j < WORD; j++) {
      const I code = (bits_of(clamped(weight[WORD * k + j] / divisor) + ROUND) + 8) & 15;  // low bits of ROUND are 0
      words[k] |= code << (j < 4 ? 8 * j : 8 * (j - 4) + 4);
    }
  }
}

}  // namespace

// weight [rows, columns] -> data [rows, 4 * ceil(columns / 8)], scale (bf16) [rows, ceil(columns / 32)].
extern "C" void longrun_int4_quantize(const float* weight, int64_t rows, int64_t columns, const float* factors,
                                      int64_t tries, uint8_t* data, uint16_t* scale, int64_t threads) {
  const int64_t per_row = (columns + GROUP - 1) / GROUP, row_bytes = 4 * ((columns + WORD - 1) / WORD);
  const int64_t groups = rows * per_row;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t first = 0; first < groups; first += LANES) {
    alignas(64) float turned[GROUP][LANES];
    const int count = int(std::min<int64_t>(LANES, groups - first));
    for (int lane = 0; lane < LANES; lane++) {
      const int64_t row = (first + lane) / per_row, at = (first + lane) % per_row * GROUP;
      const int length = lane < count ? int(std::min<int64_t>(GROUP, columns - at)) : 0;
      const float* from = weight + row * columns + at;
      for (int j = 0; j < length; j++) turned[j][lane] = from[j];
      for (int j = length; j < GROUP; j++) turned[j][lane] = 0.0f;
    }
    F group[GROUP];
    std::memcpy(group, turned, sizeof group);
    const F step = best_step(group, factors, tries);
    alignas(64) int32_t words[GROUP / WORD][LANES];
    I packed[GROUP / WORD];
    pack(group, step, packed);
    std::memcpy(words, packed, sizeof words);
    const I step_bits = bits_of(step);
    for (int lane = 0; lane < count; lane++) {
      const int64_t row = (first + lane) / per_row, at = (first + lane) % per_row * (GROUP / 2);
      const int length = int(std::min<int64_t>(GROUP / 2, row_bytes - at)) / 4;
      for (int k = 0; k < length; k++) std::memcpy(data + row * row_bytes + at + 4 * k, &words[k][lane], 4);
      scale[first + lane] = uint16_t(uint32_t(step_bits[lane]) >> 16);
    }
  }
}
