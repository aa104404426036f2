// out[b, j] = sum_i query_weight[b, i] * R_h(head_weight[h] * p[b, h, i, j]),  R = sum or max over the heads,
// p = exp(scale * <q[b, h, i], k[b, h / (H / Hkv), j]> - lse[b, h, i])
//
// Many queries: the work is every (sample, block of kBlockKeys keys, part of the queries), dealt out to the threads one
// by one. An item walks its queries in chunks of at most kChunkQueries, the heads of each in order, and every head's
// scores by the product of product.h, whose lanes are keys; they never leave the registers but for the maximum over the
// heads, [chunk, block] in the thread's scratch. Then the parts are added up, in order. Flops: 2 d + about 20 (exp) for
// each of B H Tq Tk scores, against 2 kLanes a cycle and FMA unit; each block of k is packed once per chunk and head.
//
// Few queries (at most kFewQueries): an item is a sample and kFewKeys keys, all heads. kLanes keys at a time are
// multiplied, where they lie, by each query of the heads that share them. Bytes moved: k once.
//
// No element of out depends on which thread did what: the same bits for every thread count.
#include "cpu/exp.h"
#include "cpu/isa.h"
#include "cpu/product.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kPanelQueries = 36;  // whole panels of every instruction set's kRows
constexpr int64_t kChunkQueries = 4 * kPanelQueries;
constexpr int64_t kBlockKeys = 336;  // whole tiles of every kColumns; kDepth of them fit kRightFloats
constexpr int64_t kFewKeys = 128;
constexpr int64_t kWorthThreads = 1 << 16;  // numbers to add up
static_assert(kPanelQueries % kRows == 0 && kBlockKeys % kColumns == 0 && kBlockKeys * kDepth <= kRightFloats);
static_assert(kChunkQueries * kBlockKeys <= kKeptFloats && kFewKeys % kLanes == 0);

constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// What is added to a row's scaled scores: minus infinity where no key was visible.
VLPRUNE_INLINE float minus_lse(float lse) { return lse == -__builtin_inff() ? lse : -lse; }

VLPRUNE_INLINE Vec first_lanes_of(Vec v, int64_t count) {
  float part[kLanes];
  store(part, v);
  return load(part, count);
}

template <typename T>
struct Operands {
  const AttentionImportance& args;

  const T* q(int64_t b, int64_t h) const {
    return static_cast<const T*>(args.q) + b * args.q_strides[0] + h * args.q_strides[1];
  }
  const T* k(int64_t b, int64_t h) const {
    return static_cast<const T*>(args.k) + b * args.k_strides[0] + h / (args.h / args.hkv) * args.k_strides[1];
  }
  const float* lse(int64_t b, int64_t h) const { return args.lse + (b * args.h + h) * args.tq; }
  float head_weight(int64_t b, int64_t h) const {
    return args.head_weight == nullptr ? 1.0f : args.head_weight[b * args.head_weight_stride + h];
  }
  float query_weight(int64_t b, int64_t i) const {
    return args.query_weight == nullptr ? 1.0f : args.query_weight[b * args.tq + i];
  }
  // How many keys query i sees.
  int64_t visible(int64_t i) const { return args.causal ? larger(0, i + args.tk - args.tq + 1) : args.tk; }
};

// Takes the scores of one head: rows are the queries of a chunk, columns the keys from 0 on.
template <bool kMax>
struct Weigh {
  static constexpr bool kPrefetches = false;

  const float* minus_lse;  // [chunk]
  const float* weight;     // [chunk], of the queries, and of the head where R is the sum
  float* sum;              // [block], of this head or, for the maximum, of all
  float* best;             // [chunk, kBlockKeys], the maximum over the heads so far
  float scale, head_weight;
  bool first, last;
  bool blind;         // whether a query saw no key: then its scores may be anything, NaN too
  int64_t first_key;  // of the block
  int64_t visible;    // keys that the chunk's first query sees (or less than 0); the next sees one more

  VLPRUNE_INLINE void prefetch(int64_t, int64_t) const {}

  template <int R>
  VLPRUNE_INLINE void tile(const Tile<R>& tile, int64_t row, int64_t rows, int64_t column, int64_t width) const {
    if (!blind && visible + row >= column + width) {
      weigh<R, true>(tile, row, rows, column);
    } else if (visible + row + rows > column + 1) {
      weigh<R, false>(tile, row, rows, column);
    }  // else none of the queries sees any of the keys
  }

  template <int R, bool kWhole>
  VLPRUNE_INLINE void weigh(const Tile<R>& tile, int64_t row, int64_t rows, int64_t column) const {
    float* to = sum + column - first_key;
    float* maxima = best + row * kBlockKeys + column - first_key;
    for (int i = 0; i < kVectors; ++i, to += kLanes, maxima += kLanes) {
      Vec total = zero();
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if (r >= rows) break;
        Vec p = exp(fmadd(tile.sum[r][i], broadcast(scale), broadcast(minus_lse[row + r])));
        if constexpr (!kWhole) {
          const int64_t count = minus_lse[row + r] == -__builtin_inff() ? 0 : visible + row + r - column - i * kLanes;
          if (count < kLanes) p = count > 0 ? first_lanes_of(p, count) : zero();
        }
        if constexpr (kMax) {
          p = mul(p, broadcast(head_weight));
          if (!first) p = maximum(load(maxima + r * kBlockKeys), p);
          if (!last) {
            store(maxima + r * kBlockKeys, p);
            continue;
          }
        }
        total = fmadd(p, broadcast(weight[row + r]), total);
      }
      if (!kMax || last) store(to, add(load(to), total));
    }
  }

  VLPRUNE_INLINE void end_of_panel(int64_t, int64_t) const {}
};

// The queries [query, query_end) of a sample against its keys [key, key + keys): to out [keys].
template <typename T, bool kMax>
void block_of_keys(const AttentionImportance& args, int64_t b, int64_t key, int64_t keys, int64_t query,
                   int64_t query_end, float* out) {
  const Operands<T> of{args};
  float total[kBlockKeys] = {}, sum[kBlockKeys], minus[kChunkQueries], weight[kChunkQueries];
  if (args.causal) {  // whole panels of queries before the first that sees the first key
    query += larger(0, key - (args.tk - args.tq) - query) / kPanelQueries * kPanelQueries;
  }
  for (; query < query_end; query += kChunkQueries) {
    const int64_t queries = smaller(kChunkQueries, query_end - query);
    for (int64_t h = 0; h < args.h; ++h) {
      const float head_weight = of.head_weight(b, h);
      bool blind = false;
      for (int64_t i = 0; i < queries; ++i) {
        minus[i] = minus_lse(of.lse(b, h)[query + i]);
        blind |= minus[i] == -__builtin_inff();
        weight[i] = of.query_weight(b, query + i) * (kMax ? 1.0f : head_weight);
      }
      for (int64_t j = 0; j < kBlockKeys; ++j) sum[j] = 0.0f;
      const bool first = h == 0, last = h + 1 == args.h;
      Weigh<kMax> visit{minus,
                        weight,
                        sum,
                        scratch() + kScratchFloats - kKeptFloats,
                        args.scale,
                        head_weight,
                        first,
                        last,
                        blind,
                        key,
                        args.causal ? query + args.tk - args.tq + 1 : args.tk};
      multiply(Rows<T>{of.q(b, h) + query * args.q_strides[2], args.q_strides[2]}, 0, queries,
               Rows<T>{of.k(b, h), args.k_strides[2]}, key, keys, args.d, visit);
      if (!kMax || last)
        for (int64_t j = 0; j < keys; ++j) total[j] += sum[j];
    }
  }
  for (int64_t j = 0; j < keys; ++j) out[j] = total[j];
}

template <typename T, bool kMax>
void many_queries(const AttentionImportance& args, int threads) {
  const int64_t blocks = ceil_div(args.tk, kBlockKeys);
  const int64_t keys = ceil_div(ceil_div(args.tk, blocks), kColumns) * kColumns;
  const int64_t queries = ceil_div(ceil_div(args.tq, args.parts), kPanelQueries) * kPanelQueries;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t item = 0; item < args.b * args.parts * blocks; ++item) {
    const int64_t part = item / blocks % args.parts, b = item / blocks / args.parts, key = item % blocks * keys;
    if (key >= args.tk) continue;
    block_of_keys<T, kMax>(args, b, key, smaller(keys, args.tk - key), smaller(args.tq, part * queries),
                           smaller(args.tq, (part + 1) * queries), args.partial + (part * args.b + b) * args.tk + key);
  }
}

// <query, k[l]> for l < kLanes; rows past the last one repeat the first. With kAhead, the next kLanes keys are asked
// for.
template <bool kAhead, typename T>
VLPRUNE_INLINE Vec dots(const T* query, const T* k, int64_t stride, int64_t keys, int64_t d) {
  Vec m[kLanes];
  const T* row[kLanes];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) {
    m[l] = zero();
    row[l] = k + (l < keys ? l : 0) * stride;
  }
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    const Vec x = load(query + c);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      if (kAhead) __builtin_prefetch(row[l] + kLanes * stride + c);
      m[l] = fmadd(load(row[l] + c), x, m[l]);
    }
  }
  if (c < d) {
    const Vec x = load(query + c, d - c);
    for (int l = 0; l < kLanes; ++l) m[l] = fmadd(load(row[l] + c, d - c), x, m[l]);
  }
  transpose(m);
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
    for (int l = 0; l < step; ++l) m[l] = add(m[l], m[l + step]);
  }
  return m[0];
}

template <typename T, bool kMax>
void few_queries(const AttentionImportance& args, int threads) {
  const Operands<T> of{args};
  const int64_t blocks = ceil_div(args.tk, kFewKeys), group = args.h / args.hkv;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < args.b * blocks; ++item) {
    const int64_t b = item / blocks, key = item % blocks * kFewKeys, keys = smaller(kFewKeys, args.tk - key);
    float sum[kFewKeys] = {}, best[kFewQueries][kFewKeys];
    for (int64_t first_head = 0; first_head < args.h; first_head += group) {
      for (int64_t j = 0; j < keys; j += kLanes) {
        const T* k = of.k(b, first_head) + (key + j) * args.k_strides[2];
        for (int64_t h = first_head; h < first_head + group; ++h) {
          const Vec head_weight = broadcast(of.head_weight(b, h));
          for (int64_t i = 0; i < args.tq; ++i) {
            const T* query = of.q(b, h) + i * args.q_strides[2];
            const bool ahead = h == first_head && i == 0 && j + kLanes < keys;
            const Vec scores = ahead ? dots<true>(query, k, args.k_strides[2], keys - j, args.d)
                                     : dots<false>(query, k, args.k_strides[2], keys - j, args.d);
            const float minus = minus_lse(of.lse(b, h)[i]);
            Vec p = exp(fmadd(scores, broadcast(args.scale), broadcast(minus)));
            const int64_t count = minus == -__builtin_inff() ? 0 : of.visible(i) - key - j;
            if (count < kLanes) p = count > 0 ? first_lanes_of(p, count) : zero();
            p = mul(p, head_weight);
            if constexpr (kMax) {
              store(best[i] + j, h == 0 ? p : maximum(load(best[i] + j), p));
            } else {
              store(sum + j, fmadd(p, broadcast(of.query_weight(b, i)), load(sum + j)));
            }
          }
        }
      }
    }
    if constexpr (kMax) {
      for (int64_t i = 0; i < args.tq; ++i)
        for (int64_t j = 0; j < keys; ++j) sum[j] = madd(of.query_weight(b, i), best[i][j], sum[j]);
    }
    for (int64_t j = 0; j < keys; ++j) args.partial[b * args.tk + key + j] = sum[j];
  }
}

template <typename T, bool kMax>
void run(const AttentionImportance& args, int threads) {
  if (args.tq <= kFewQueries && args.parts == 1) {
    few_queries<T, kMax>(args, threads);
  } else {
    many_queries<T, kMax>(args, threads);
  }
  if (args.parts == 1 && args.key_mask == nullptr) return;  // partial is out
  const int64_t keys = args.b * args.tk;
#pragma omp parallel for num_threads(threads) schedule(static) if (keys * args.parts > kWorthThreads)
  for (int64_t index = 0; index < keys; ++index) {
    float sum = args.partial[index];
    for (int64_t part = 1; part < args.parts; ++part) sum += args.partial[part * keys + index];
    args.out[index] = args.key_mask == nullptr || args.key_mask[index] != 0 ? sum : 0.0f;
  }
}

}  // namespace

void attention_importance(const AttentionImportance& args, int threads) {
  dispatch(args.dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    args.max ? run<T, true>(args, threads) : run<T, false>(args, threads);
  });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
