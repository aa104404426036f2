// Every launcher of the extension: one contract, a CPU and a CUDA declaration.
//
// All pointers are to memory the caller owns. Launchers allocate nothing, retain nothing and do not synchronise. Sizes
// and strides are in elements, int64_t. Shapes, dtypes and value ranges were checked by the caller
// (vlprune_ext/ops/*.py). cpu:: runs on at most `threads` threads; cuda:: runs on `stream` (a cudaStream_t) of the
// current device. The same inputs give the same bits on every run and for every thread count.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace vlprune {

// out[i, n, :] = base[n, :] - x[n, G_i] . weight[:, G_i]^T  with  G_i = [groups[i]*g, (groups[i]+1)*g)
struct LeaveOneOut {
  const void* x;          // [N, K], rows `x_stride` apart, last dimension contiguous
  const void* weight;     // [D, K], rows `weight_stride` apart, last dimension contiguous
  const void* base;       // [N, D], rows `base_stride` apart, last dimension contiguous
  void* out;              // [V, N, D], contiguous
  const int64_t* groups;  // [V] on the host, also for cuda::; 0 <= groups[i] < K / group_size
  int64_t n, d, v;        // N, D, V
  int64_t group_size;     // g
  int64_t x_stride, weight_stride, base_stride;
  DType dtype;  // of x, weight, base and out; products are accumulated in fp32, rounded once
};

// rank[v, n] = #{ m : <query[v,n], gallery[v or 0, m]> > best[v,n] },  best = max over p of the positives' scores.
// The positives' scores are computed by the same arithmetic as all others, so an exact copy of a positive never counts
// as higher. rank = -1 where any score of the row is NaN.
constexpr int64_t kSplitDepth = 32;
struct RetrievalRank {
  const void* query;         // [V, N, D], contiguous
  const void* gallery;       // [V or 1, M, D], contiguous
  const int64_t* positives;  // [N, P], contiguous; -1 pads a row; at least one entry >= 0 in each row
  float* best;               // [V, N] scratch
  int32_t* rank;             // [V, N]
  // Scratch of cuda:: in fp32; V * N + (V or 1) * M rows in all.
  void* split;       // [rows, 2, D rounded up to a multiple of kSplitDepth], two bytes each
  float* norm;       // [rows]
  uint64_t* listed;  // [1 + capacity]
  int64_t capacity;  // pairs of a query and an item to look at twice; the more there are, the slower where it is short
  int64_t v, n, m, d, p;
  bool shared_gallery;  // true: gallery has a leading dimension of 1
  DType dtype;          // of query and gallery; scores are fp32
};

// acc[j] += sum_n token_weight[n] * x[n, j]^2, accumulated in fp32: the rows of a chunk of kNormChunk in an order that
// never changes, then the chunks in ascending order.
constexpr int64_t kNormChunk = 128;
struct ColumnNormSq {
  float* acc;                 // [in]
  const void* x;              // [N, in], rows `x_stride` apart, last dimension contiguous
  const float* token_weight;  // [N]; null: all 1
  float* partial;             // [ceil(N / kNormChunk), in] scratch
  int64_t n, in, x_stride;
  DType dtype;  // of x
};

// What the selections below order by: key[i, j] = the bits of fp32 |weight[i, j]| * scale[j], as uint32. Such floats
// are not negative, so they compare as integers do; a NaN is above infinity.
struct Keys {
  const void* weight;  // [out, in], rows `stride` apart, last dimension contiguous
  const float* scale;  // [in]; null: all 1
  int64_t out, in, stride;
  DType dtype;  // of weight
};

// Zeroes (+0) the k least keys of each row, ties to the lower index; 0 <= k <= in.
struct PruneSmallest {
  Keys keys;
  void* weight;   // keys.weight, written in place where mask is null
  uint8_t* mask;  // [out, in], contiguous, or null: 1 for what would be zeroed, 0 for the rest; no other write
  int64_t k;      // of every row where k_of_row is null
  const int64_t* k_of_row;  // [out] or null
};

// Zeroes (+0) the n least keys of every m consecutive ones of a row, ties to the lower index; 0 < n < m, in % m == 0.
struct PruneNM {
  Keys keys;
  void* weight;   // as in PruneSmallest
  uint8_t* mask;  // as in PruneSmallest
  int64_t n, m;
};

// counts[digit(key)] += 1 for every key that begins with the digits found so far. Digits, from the top: bits 30..20
// (level 0), 19..10 (level 1), 9..0 (level 2); bit 31 is 0. Three calls find the k-th least key of any number of
// matrices.
constexpr int64_t kHistogramBins = 2048;
struct KeyHistogram {
  Keys keys;
  int64_t* counts;        // [kHistogramBins]
  const int64_t* prefix;  // a single number: key >> 20 at level 1, key >> 10 at level 2, not read at level 0
  int64_t level;
};

// below[i], equal[i] = how many keys of row i are less than / equal to *threshold.
struct CountKeys {
  Keys keys;
  const int64_t* threshold;  // a single number
  int64_t* below;            // [out]
  int64_t* equal;            // [out]
};

// plus = weight + eps z, minus = weight - eps z, z ~ N(0, 1) by normal4() of philox.h; product and sums in fp32, each
// rounded once more on storing. Element e takes number (e % 64) / 16 of the four of counter e / 64 * 16 + e % 16.
struct Perturb {
  const void* weight;  // [count], contiguous
  void* plus;          // [count], contiguous
  void* minus;         // [count], contiguous
  int64_t count;
  uint64_t seed, tensor;
  float eps;
  DType dtype;  // of weight, plus and minus
};

// out[b, j] = sum_i query_weight[b, i] * R_h(head_weight[h] * p[b, h, i, j]),  R = sum or max over the heads,
// p = exp(scale * <q[b, h, i], k[b, h / (H / Hkv), j]> - lse[b, h, i]), and 0 where lse = -inf, where key_mask[b, j] is
// 0, and, if causal, where j > i + Tk - Tq. Scores, p and sums are fp32. exp(x) is within 2 units in the last place; in
// fp16/bf16 on CUDA within 2 + 1.2 |x| of them.
constexpr int64_t kFewQueries = 8;  // up to here k is read once, and parts = 1
struct AttentionImportance {
  const void* q;              // [B, H, Tq, d], `q_strides` between batches, heads and tokens
  const void* k;              // [B, Hkv, Tk, d], `k_strides` likewise; the last dimension contiguous, of both
  const float* lse;           // [B, H, Tq], contiguous
  const float* head_weight;   // [B or 1, H], `head_weight_stride` between batches (0 for 1); null: all 1
  const float* query_weight;  // [B, Tq]; null: all 1
  const uint8_t* key_mask;    // [B, Tk], 1 for the keys that were attended; null: all
  float* partial;             // [parts, B, Tk] scratch; `out` where parts = 1
  float* out;                 // [B, Tk]
  int64_t b, h, hkv, tq, tk, d, parts;
  int64_t q_strides[3], k_strides[3];
  int64_t head_weight_stride;
  float scale;
  bool max;     // R
  bool causal;  // the last query sees all keys
  DType dtype;  // of q and k
};

// What select_tokens orders by, the least first: number(score) = the bits of fp32 score, of a negative one as they are,
// of others with the lower 31 inverted, so that the highest score has the least; -0 as +0, every NaN kNoScore, behind
// -inf. Where fewer tokens than `keep` are protected, those have kAlways instead; elsewhere all others have kNever.
constexpr uint32_t kAlways = 0, kNoScore = 0xff800001u, kNever = 0xffffffffu;

// index[i, :] = the `keep` tokens of row i that come first by number, ties to the lower position; ascending.
struct SelectTokens {
  const void* score;       // [rows, tokens], rows `score_stride` apart, last dimension contiguous
  const uint8_t* protect;  // [rows, tokens] of 0 or 1, rows `protect_stride` apart, last dimension contiguous; or null
  int64_t* index;          // [rows, keep], contiguous
  int64_t rows, tokens, keep;  // 0 < keep <= tokens < 2^31
  int64_t score_stride, protect_stride;
  DType dtype;  // of score
};

// kept[b, :] = 1 for the tokens that sample b keeps, 0 for the rest. The first one kept is the candidate whose greatest
// similarity to another candidate is least; each next one is the candidate whose greatest similarity to those kept so
// far is least; ties go to the lower position. A candidate without a direction (a NaN in it, or a sum of squares of
// 2^126 or more) is similar to none and comes after all others. similarity(i, j) = <x_i, x_j> / (|x_i| |x_j|) in fp32,
// 0 where either's squares sum to less than 2^-126; the order of sums depends on d only, and both ways round have the
// same bits.
struct DiverseTokens {
  const void* x;                  // [B, T, d], `batch_stride` and `token_stride`, last dimension contiguous
  const uint8_t* candidate;       // [B, T] of 0 or 1, contiguous; null: all 1
  const int64_t* keep_of_sample;  // [B]: how many, all candidates where they are fewer, none below 0; or null
  uint8_t* kept;                  // [B, T]
  float* gram;                    // [B, T, T] scratch
  float* scale;                   // [B, T] scratch
  float* closest;                 // [B, T] scratch
  int64_t batch, tokens, d;       // B, T, d >= 1
  int64_t keep;                   // of every sample where keep_of_sample is null
  int64_t batch_stride, token_stride;
  DType dtype;  // of x
};

// One tensor of compact_tokens, as runs of `run` bytes: in [B or 1, outer, T, inner, run], out [B, outer, K, inner,
// run], contiguous. Strides are in bytes.
struct TokenTensor {
  const void* in;
  void* out;
  int64_t outer, inner, run;
  int64_t batch_stride;  // 0: one for all
  int64_t outer_stride, token_stride, inner_stride;
};

// out[b, :, k, :] = in[b, :, index[b, k], :] for each of some tensors.
struct CompactTokens {
  const int64_t* index;        // [B, K], contiguous, 0 <= index < T
  const TokenTensor* tensors;  // [count] on the host, also for cuda::
  int64_t count;
  int64_t batch, keep, tokens;  // B, K, T
};

// similarity[b, i] = max over targets j != i of cos_ij, match[b, i] = that j, ties to the lower; for a source i,
// cos_ij = <key[b, i], key[b, j]> / (|key[b, i]| |key[b, j]|), 0 where a length is 0. A NaN is no similarity. -inf and
// -1 where there is none, and for a token that is no source. Products and squared lengths are fp32, each summed in an
// order that only d decides.
struct MatchTokens {
  const void* key;        // [B, T, d], `key_strides` between batches and tokens, last dimension contiguous
  const uint8_t* target;  // [B, T] of 0 or 1, contiguous
  const uint8_t* source;  // likewise; null: every token that is no target
  float* similarity;      // [B, T]
  int64_t* match;         // [B, T]
  int32_t* lists;         // [B, 3, T] scratch: targets, sources, each source's place among the targets or -1
  int32_t* counts;        // [B, 2] scratch: targets, sources
  float* inverse;         // [B, T] scratch: 1 / length of each target
  void* gathered;         // [B, slots, depth] scratch of cuda::, on a multiple of 16 bytes; not touched by cpu::
  int64_t b, t, d;        // t < 2^31
  int64_t slots, depth;   // T, or 2 T where there is a source; d rounded up to a multiple of 8
  int64_t key_strides[2];
  DType dtype;  // of key
};

// Each token of index keeps the mean of itself and of what merges into it, weighted by size: of the tokens t that are
// not in index, those of which match[b, t] is its position. Of the other tokens nothing remains, whatever their match.
//   total[b, k] = sum of size,  out[b, :, k, :] = (sum of size * in) / total[b, k],
// in fp32, itself first, then by ascending t, each product, sum and quotient rounded by itself, then to the dtype. A
// token of size 0 gives nothing, and a kept token that is given nothing stays as it is, bit for bit.
constexpr int64_t kMergeParts = 16;  // of a sample's tokens, which cuda:: lists at the same time
struct MergeTokens {
  const int64_t* index;        // [B, K], contiguous, ascending, 0 <= index < T
  const int64_t* match;        // [B, T], contiguous, any numbers
  const float* size;           // [B, T], contiguous; null: all 1
  float* total;                // [B, K]
  int32_t* lists;              // [B, 3, T] scratch: place in index or -1; what merges, by k and t; its sizes (fp32)
  int32_t* ends;               // [B, kMergeParts, K] scratch; the last part: where in the list that of each k ends
  const TokenTensor* tensors;  // [count] on the host, also for cuda::
  const int32_t* dtypes;       // [count] of DType, on the host, likewise
  int64_t count;
  int64_t batch, keep, tokens;  // B, K, T; T < 2^31
};

// The list of ops, each with its struct. `where` is what `apply` needs to know beside.
#define VLPRUNE_FOR_EACH_OP(apply, where)                  \
  apply(leave_one_out, LeaveOneOut, where);                \
  apply(retrieval_rank, RetrievalRank, where);             \
  apply(column_norm_sq, ColumnNormSq, where);              \
  apply(prune_smallest, PruneSmallest, where);             \
  apply(prune_nm, PruneNM, where);                         \
  apply(key_histogram, KeyHistogram, where);               \
  apply(count_keys, CountKeys, where);                     \
  apply(perturb, Perturb, where);                          \
  apply(attention_importance, AttentionImportance, where); \
  apply(select_tokens, SelectTokens, where);               \
  apply(diverse_tokens, DiverseTokens, where);             \
  apply(compact_tokens, CompactTokens, where);             \
  apply(match_tokens, MatchTokens, where);                 \
  apply(merge_tokens, MergeTokens, where)

#define VLPRUNE_DECLARE(op, Args, where) void op(const Args& args, where)

namespace cpu {
VLPRUNE_FOR_EACH_OP(VLPRUNE_DECLARE, int threads);
}  // namespace cpu

namespace cuda {
VLPRUNE_FOR_EACH_OP(VLPRUNE_DECLARE, void* stream);
}  // namespace cuda

}  // namespace vlprune
