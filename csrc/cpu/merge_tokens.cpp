// total[b, k] = sum of size,  out[b, :, k, :] = (sum of size * in) / total[b, k]  over a kept token and what merges
// into it
//
// Each thread lists, for whole samples, what merges into each kept token: by counting, in ascending order. Then work
// is, tensor after tensor, the sequence of pieces of token_pieces.h, dealt out to the threads. Of a run, kTogether sums
// at a time are made in memory of the first-level cache, token after token; a token that is given nothing is copied.
// Bytes moved: what is kept or merges read once, what is kept written once.
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "cpu/token_pieces.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kTogether = 2048;
constexpr int64_t kAhead = 4, kPrefetched = 512;  // tokens, bytes of each
static_assert(kTogether % kLanes == 0);

struct Sample {
  const int64_t* index;  // [K]
  const int64_t* match;  // [T]
  const float* size;     // [T] or null
  int32_t* place;        // [T], in index, or -1
  int32_t* token;        // what merges, by k and t
  float* weight;         // its size
  int32_t* end;          // [K], in token

  Sample(const MergeTokens& args, int64_t b)
      : index(args.index + b * args.keep),
        match(args.match + b * args.tokens),
        size(args.size == nullptr ? nullptr : args.size + b * args.tokens),
        place(args.lists + b * 3 * args.tokens),
        token(place + args.tokens),
        weight(reinterpret_cast<float*>(token + args.tokens)),
        end(args.ends + (b * kMergeParts + kMergeParts - 1) * args.keep) {}

  float size_of(int64_t t) const { return size == nullptr ? 1.0f : size[t]; }
  int64_t begin(int64_t k) const { return k == 0 ? 0 : end[k - 1]; }

  // Where t merges into, or -1.
  int64_t into(int64_t t, int64_t tokens) const {
    if (place[t] >= 0 || size_of(t) == 0.0f) return -1;
    return uint64_t(match[t]) < uint64_t(tokens) ? place[match[t]] : -1;
  }
};

void list_tokens(const MergeTokens& args, int64_t b) {
  const Sample of(args, b);
  for (int64_t t = 0; t < args.tokens; ++t) of.place[t] = -1;
  for (int64_t k = 0; k < args.keep; ++k) {
    of.place[of.index[k]] = int32_t(k);
    of.end[k] = 0;
  }
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t k = of.into(t, args.tokens);
    if (k >= 0) ++of.end[k];
  }
  int32_t listed = 0;
  for (int64_t k = 0; k < args.keep; ++k) {  // for now, end is where the list begins
    const int32_t count = of.end[k];
    of.end[k] = listed;
    listed += count;
  }
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t k = of.into(t, args.tokens);
    if (k < 0) continue;
    of.token[of.end[k]] = int32_t(t);
    of.weight[of.end[k]++] = of.size_of(t);
  }
  for (int64_t k = 0; k < args.keep; ++k) {
    float total = of.size_of(of.index[k]);
    for (int64_t i = of.begin(k); i < of.end[k]; ++i) total += of.weight[i];
    args.total[b * args.keep + k] = total;
  }
}

// Asks for the beginning of a run: where a jump comes, the machine's own prefetching does not follow.
VLPRUNE_INLINE void prefetch(const void* run, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes && byte < kPrefetched; byte += 64)
    __builtin_prefetch(static_cast<const char*>(run) + byte);
}

template <typename T>
VLPRUNE_INLINE Vec weighed(const T* x, float weight, int64_t count) {
  return mul(broadcast(weight), count < kLanes ? load(x, count) : load(x));
}

// out[0 .. count) for kept token k of a sample, one run; `in` is that of token 0, `listed` the length of the list.
template <typename T>
void average(const Sample& of, int64_t k, int64_t listed, float total, const char* in, int64_t token_stride,
             int64_t count, T* out) {
  const int64_t self = of.index[k];
  const float own = of.size_of(self);
  const auto run_of = [&](int64_t t) { return reinterpret_cast<const T*>(in + t * token_stride); };
  alignas(64) float sum[kTogether];
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t width = count - first < kTogether ? count - first : kTogether;
    for (int64_t c = 0; c < width; c += kLanes)
      store(sum + c, own == 0.0f ? zero() : weighed(run_of(self) + first + c, own, width - c));
    for (int64_t i = of.begin(k); i < of.end[k]; ++i) {
      const T* const x = run_of(of.token[i]) + first;
      if (i + kAhead < listed) prefetch(run_of(of.token[i + kAhead]) + first, width * int64_t(sizeof(T)));
      for (int64_t c = 0; c < width; c += kLanes)
        store(sum + c, add(load(sum + c), weighed(x + c, of.weight[i], width - c)));
    }
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec mean = div(load(sum + c), broadcast(total));
      width - c < kLanes ? store(out + first + c, mean, width - c) : store(out + first + c, mean);
    }
  }
}

template <typename T>
void merge_piece(const MergeTokens& args, const TokenTensor& tensor, int64_t b, int64_t k, int64_t count,
                 const char* in, char* out) {
  const Sample of(args, b);
  const int64_t listed = of.end[args.keep - 1];
  for (const int64_t last = k + count; k < last; ++k) {
    if (k + kAhead < last) prefetch(in + of.index[k + kAhead] * tensor.token_stride, tensor.run);
    for (int64_t i = 0; i < tensor.inner; ++i, out += tensor.run) {
      const char* const from = in + i * tensor.inner_stride;
      if (of.begin(k) == of.end[k]) {
        std::memcpy(out, from + of.index[k] * tensor.token_stride, size_t(tensor.run));
      } else {
        average(of, k, listed, args.total[b * args.keep + k], from, tensor.token_stride,
                tensor.run / int64_t(sizeof(T)), reinterpret_cast<T*>(out));
      }
    }
  }
}

}  // namespace

void merge_tokens(const MergeTokens& args, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (args.batch > 1)
  for (int64_t b = 0; b < args.batch; ++b) list_tokens(args, b);

  for_each_piece(args.tensors, args.count, args.batch, args.keep, threads,
                 [&](int64_t t, int64_t b, int64_t k, int64_t count, const char* in, char* out) {
                   dispatch(DType(args.dtypes[t]), [&](auto tag) {
                     merge_piece<Element<decltype(tag)>>(args, args.tensors[t], b, k, count, in, out);
                   });
                 });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
