// Scores of pages by their digests, and the choice of the best, on the CPU. Digests: see quant/digest_format.py; what is
// computed: kernels/page_score.py and kernels/page_choose.py.
//
// Plain C interface, called through ctypes (kernels/cpu_select.py). Built for the machine it runs on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int8_t v8s __attribute__((vector_size(8)));
typedef uint8_t v8b __attribute__((vector_size(8)));
constexpr int MAX_GROUP = 8, MAX_DIM = 128;

inline v8f load8(const float* p) { v8f r; std::memcpy(&r, p, 32); return r; }
inline float sum8(v8f v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
template <typename From> inline v8f floats(From x) { return __builtin_convertvector(__builtin_convertvector(x, v8i), v8f); }

inline float half_to_float(const uint8_t* from) {
  uint16_t h;
  std::memcpy(&h, from, 2);
  const uint32_t bits = uint32_t(h & 0x7fff) << 13;  // scales are positive
  float x;
  std::memcpy(&x, &bits, 4);
  return x * 0x1p112f;
}

struct List {  // candidates of all heads: kernels/page_view.py
  const int32_t *pages;
  int64_t stride;
  const int32_t *begins, *counts;
  int64_t skip, limit;
  int64_t entries(int64_t head) const { return std::max<int64_t>(0, std::min(counts[head] - skip, limit)); }
  const int32_t* of(int64_t head) const { return pages + head * stride + begins[head] + skip; }
};

struct Query {  // of one KV head
  float q[MAX_GROUP][MAX_DIM], of_half[MAX_GROUP][MAX_DIM];
  float sums[MAX_GROUP];
};

// sums[n] += a[n] . bytes, as int8
template <int G> void bytes_product(const uint8_t* codes, int dim, const float (*a)[MAX_DIM], v8f* sums) {
  for (int c = 0; c < dim; c += 8) {
    v8s x;
    std::memcpy(&x, codes + c, 8);
    const v8f f = floats(x);
    for (int n = 0; n < G; n++) sums[n] += load8(a[n] + c) * f;
  }
}
// the same of nibbles, channel c in the low one of byte c, c + dim / 2 in the high one
template <int G> void nibbles_product(const uint8_t* codes, int dim, const float (*a)[MAX_DIM], v8f* sums) {
  for (int c = 0; c < dim / 2; c += 8) {
    v8b x;
    std::memcpy(&x, codes + c, 8);
    const v8f low = floats(x & 15), high = floats(x >> 4);
    for (int n = 0; n < G; n++) {
      sums[n] += load8(a[n] + c) * low;
      sums[n] += load8(a[n] + dim / 2 + c) * high;
    }
  }
}

}  // namespace

extern "C" {

struct Score {
  List list;
  const void* q;  // [heads, group, head_dim]
  const uint8_t* digest;
  float* out;  // [heads, group, room]
  int64_t digest_stride, heads, group, head_dim, centre_bits, groups, room, q_bf16, threads;
  double softmax_scale, lam, unrotate;
};
}

namespace {

void prepare(const Score& call, int64_t head, Query& query) {
  const int dim = int(call.head_dim);
  for (int n = 0; n < call.group; n++) {
    float *x = query.q[n], *turned = query.of_half[n];
    const int64_t row = (head * call.group + n) * dim;
    float sum = 0;
    for (int c = 0; c < dim; c++) {
      const uint32_t bits = call.q_bf16 ? uint32_t(static_cast<const uint16_t*>(call.q)[row + c]) << 16 : 0;
      float value;
      std::memcpy(&value, &bits, 4);
      if (!call.q_bf16) value = static_cast<const float*>(call.q)[row + c];
      x[c] = turned[c] = value * float(call.softmax_scale);
      sum += x[c];
    }
    query.sums[n] = sum;
    for (int half = 1; half < dim; half *= 2)
      for (int c = 0; c < dim; c++)
        if (!(c & half)) {
          const float low = turned[c], high = turned[c + half];
          turned[c] = low + high, turned[c + half] = low - high;
        }
    for (int c = 0; c < dim; c++) turned[c] = std::fabs(turned[c]) * float(call.lam * call.unrotate);
  }
}

template <int G> void score_page(const Score& call, const Query& query, const uint8_t* at, float* out, int64_t room) {
  const int dim = int(call.head_dim), half_at = dim * int(call.centre_bits) / 8, scales_at = half_at + dim / 2;
  float scores[G][16];
  for (int group = 0; group < call.groups; group++, at += scales_at + 4) {
    v8f centre[G] = {}, half[G] = {};
    if (call.centre_bits == 8) bytes_product<G>(at, dim, query.q, centre);
    else nibbles_product<G>(at, dim, query.q, centre);
    if (call.lam != 0) nibbles_product<G>(at + half_at, dim, query.of_half, half);
    const float of_centre = half_to_float(at + scales_at), of_half = half_to_float(at + scales_at + 2);
    for (int n = 0; n < G; n++) {
      scores[n][group] = of_centre * (sum8(centre[n]) - (call.centre_bits == 8 ? 0 : 8 * query.sums[n]));
      if (call.lam != 0) scores[n][group] += of_half * sum8(half[n]);
    }
  }
  for (int n = 0; n < G; n++) {
    float top = scores[n][0], sum = 0;
    for (int group = 1; group < call.groups; group++) top = std::max(top, scores[n][group]);
    for (int group = 0; group < call.groups; group++) sum += std::exp(scores[n][group] - top);
    out[n * room] = top + std::log(sum);
  }
}

template <int G> void score_entries(const Score& call, const Query& query, int64_t head, int64_t from, int64_t to) {
  const uint8_t* digest = call.digest + head * call.digest_stride;
  const int64_t page_bytes = call.groups * (call.head_dim * (call.centre_bits + 4) / 8 + 4);
  for (int64_t e = from; e < to; e++)
    score_page<G>(call, query, digest + call.list.of(head)[e] * page_bytes, call.out + head * G * call.room + e, call.room);
}

using Scorer = void (*)(const Score&, const Query&, int64_t, int64_t, int64_t);
constexpr Scorer SCORERS[] = {score_entries<1>, score_entries<2>, score_entries<3>, score_entries<4>,
                              score_entries<5>, score_entries<6>, score_entries<7>, score_entries<8>};

}  // namespace

extern "C" {

// Returns the length of the longest list; entries past `room` are not scored.
int64_t longrun_score_pages(const Score* given) {
  const Score& call = *given;
  constexpr int64_t EACH = 128;  // entries that one thread takes at a time
  int64_t longest = 0;
  for (int64_t head = 0; head < call.heads; head++) {
    const int64_t entries = call.list.entries(head), meant = std::min(entries, call.room);
    longest = std::max(longest, entries);
    Query query;
    prepare(call, head, query);
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.threads > 1 && meant > EACH)
    for (int64_t from = 0; from < meant; from += EACH)
      SCORERS[call.group - 1](call, query, head, from, std::min(meant, from + EACH));
  }
  return longest;
}

struct Choose {
  List list;
  const float* scores;  // [heads, group, room]
  int32_t *pages_out, *counts_out;
  int64_t out_stride, heads, group, room, least, share, newest;
  double norm_step;
  int64_t share_steps;
};

void longrun_choose_pages(const Choose* given) {
  const Choose& call = *given;
  std::vector<float> values;
  std::vector<int32_t> order;
  for (int64_t head = 0; head < call.heads; head++) {
    const int64_t entries = std::min(call.list.entries(head), call.room);
    const int64_t of_share = (entries * call.share + call.share_steps - 1) / call.share_steps;
    const int64_t chosen = std::min(entries, std::max(call.least, of_share));
    const int32_t* pages = call.list.of(head);
    int32_t* out = call.pages_out + head * call.out_stride;
    call.counts_out[head] = int32_t(chosen);
    if (entries == chosen) {
      std::copy(pages, pages + entries, out);
      continue;
    }
    values.assign(entries, -std::numeric_limits<float>::infinity());
    for (int64_t n = 0; n < call.group; n++) {
      const float* scores = call.scores + (head * call.group + n) * call.room;
      const float top = *std::max_element(scores, scores + entries);
      double sum = 0;
      for (int64_t e = 0; e < entries; e++) sum += std::exp(scores[e] - top);
      const float total = float(std::nearbyint((top + std::log(sum)) / call.norm_step) * call.norm_step);
      for (int64_t e = 0; e < entries; e++) values[e] = std::max(values[e], scores[e] - total);
    }
    for (int64_t e = std::max<int64_t>(0, entries - call.newest); e < entries; e++)
      values[e] = std::numeric_limits<float>::infinity();
    order.resize(entries);
    for (int64_t e = 0; e < entries; e++) order[e] = int32_t(e);
    auto better = [&](int32_t a, int32_t b) { return values[a] != values[b] ? values[a] > values[b] : a < b; };
    std::nth_element(order.begin(), order.begin() + chosen, order.end(), better);
    std::sort(order.begin(), order.begin() + chosen);
    for (int64_t i = 0; i < chosen; i++) out[i] = pages[order[i]];
  }
}
}
