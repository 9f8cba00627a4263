// Weights of GGUF files to float32 or bfloat16, for the types that most files hold. The products, sums and
// differences are those of the gguf package, one by one; nothing here may be contracted, so that both give the same bits.
//
// Plain C interface, called through ctypes (kernels/cpu_gguf.py). Built for the machine it runs on.

#include <cstdint>
#include <cstring>
namespace {

template <typename To, typename From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To out; std::memcpy(&out, &x, sizeof(To));
  return out;
}

inline float half_at(const uint8_t* at) {
  uint16_t half; std::memcpy(&half, at, 2);
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = uint32_t(half & 0x7fff) << 13;
  if (magnitude >= 0x7c00u << 13) return bits_as<float>(sign | 0x7f800000 | magnitude);
  // the exponent is still biased by 15; the product rebiases it and is exact for subnormals too
  return bits_as<float>(sign | bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f));
}

inline uint16_t to_bf16(float x) {  // to nearest even; NaN stays one
  const uint32_t bits = bits_as<uint32_t>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Without a minimum, codes begin at -8.
template <bool MINIMUM>
struct Q4 {
  static constexpr int VALUES = 32, BYTES = MINIMUM ? 20 : 18;
  static void block(const uint8_t* __restrict from, float* __restrict to) {
    const float scale = half_at(from), minimum = MINIMUM ? half_at(from + 2) : 0.0f;
    const uint8_t* codes = from + BYTES - 16;
    for (int i = 0; i < 16; i++) {
      const float low = scale * float((codes[i] & 15) - (MINIMUM ? 0 : 8));
      const float high = scale * float((codes[i] >> 4) - (MINIMUM ? 0 : 8));
      to[i] = MINIMUM ? low + minimum : low;
      to[16 + i] = MINIMUM ? high + minimum : high;
    }
  }
};

struct Q8_0 {
  static constexpr int VALUES = 32, BYTES = 34;
  static void block(const uint8_t* __restrict from, float* __restrict to) {
    const float scale = half_at(from);
    for (int i = 0; i < 32; i++) to[i] = float(int8_t(from[2 + i])) * scale;
  }
};

// Eight groups of 32 with six bits each of scale and minimum; Q5_K has the nibbles' fifth bits in front of them.
template <bool FIFTH>
struct Nibbles {
  static constexpr int VALUES = 256, BYTES = FIFTH ? 176 : 144;
  static void block(const uint8_t* __restrict from, float* __restrict to) {
    const float scale = half_at(from), minimum = half_at(from + 2);
    const uint8_t *packed = from + 4, *high = from + 16, *low = from + (FIFTH ? 48 : 16);
    for (int group = 0; group < 8; group++) {
      const int j = group & 3, a = packed[j], b = packed[4 + j], c = packed[8 + j], shift = group % 2 * 4;
      const float step = scale * float(group < 4 ? a & 63 : (c & 15) | (a >> 2 & 48));
      const float less = minimum * float(group < 4 ? b & 63 : c >> 4 | (b >> 2 & 48));
      for (int i = 0; i < 32; i++) {
        const int fifth = FIFTH ? (high[i] >> group & 1) << 4 : 0;
        to[group * 32 + i] = step * float((low[group / 2 * 32 + i] >> shift & 15) | fifth) - less;
      }
    }
  }
};

struct Q6_K {
  static constexpr int VALUES = 256, BYTES = 210;
  static void block(const uint8_t* __restrict from, float* __restrict to) {
    const float scale = half_at(from + 208);
    for (int group = 0; group < 16; group++) {  // of 16 values: 64 bytes have the low bits of 128, 32 the high ones
      const int quarter = group / 2 % 4, half = group / 8, at = group % 2 * 16;
      const uint8_t *low = from + half * 64 + quarter % 2 * 32 + at, *high = from + 128 + half * 32 + at;
      const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
      const float step = scale * float(int8_t(from[192 + group]));
      for (int i = 0; i < 16; i++) {
        const int code = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
        to[group * 16 + i] = step * float(code - 32);
      }
    }
  }
};

// `count` blocks, one behind the other -> values in their order.
template <typename Type>
void blocks(const uint8_t* from, int64_t count, bool bf16, void* to) {
  for (int64_t i = 0; i < count; i++, from += Type::BYTES) {
    if (!bf16) {
      Type::block(from, static_cast<float*>(to) + i * Type::VALUES);
      continue;
    }
    float values[Type::VALUES];
    Type::block(from, values);
    uint16_t* __restrict out = static_cast<uint16_t*>(to) + i * Type::VALUES;
    for (int j = 0; j < Type::VALUES; j++) out[j] = to_bf16(values[j]);
  }
}

}  // namespace

#define LONGRUN_TYPE(NAME, ...)                                                                        \
  extern "C" void longrun_gguf_##NAME(const uint8_t* from, int64_t count, int64_t bf16, void* to) {    \
    blocks<__VA_ARGS__>(from, count, bf16, to);                                                        \
  }
LONGRUN_TYPE(Q4_0, Q4<false>)
LONGRUN_TYPE(Q4_1, Q4<true>)
LONGRUN_TYPE(Q8_0, Q8_0)
LONGRUN_TYPE(Q4_K, Nibbles<false>)
LONGRUN_TYPE(Q5_K, Nibbles<true>)
LONGRUN_TYPE(Q6_K, Q6_K)
