// Every launcher as a Python function of tensors, then scalars. vlprune_ext/_native.py has checked everything about
// them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"
#include "tensor.h"

namespace py = pybind11;
using vlprune::Tensor;

namespace {

// `where` is the stream's address for CUDA and the number of threads for the CPU: one type, so that both functions of
// an op have one signature, which pybind11 compiles once.
template <auto Launch, typename Args>
void launch(const Args& args, std::uintptr_t where) {
  py::gil_scoped_release release;
  if constexpr (std::is_invocable_v<decltype(Launch), const Args&, void*>) {
    Launch(args, reinterpret_cast<void*>(where));
  } else {
    Launch(args, static_cast<int>(where));
  }
}

template <auto Launch>
void leave_one_out(const Tensor& x, const Tensor& weight, const Tensor& base, const Tensor& out,
                   const std::vector<int64_t>& groups, int64_t group_size, std::uintptr_t where) {
  vlprune::LeaveOneOut args{};
  args.x = x;
  args.weight = weight;
  args.base = base;
  args.out = out;
  args.groups = groups.data();
  args.n = base.size(0);
  args.d = base.size(1);
  args.v = static_cast<int64_t>(groups.size());
  args.group_size = group_size;
  args.x_stride = x.stride(0);
  args.weight_stride = weight.stride(0);
  args.base_stride = base.stride(0);
  args.dtype = x.dtype;
  launch<Launch>(args, where);
}

template <auto Launch>
void retrieval_rank(const Tensor& query, const Tensor& gallery, const Tensor& positives, const Tensor& best,
                    const Tensor& rank, const Tensor& split, const Tensor& norm, const Tensor& listed,
                    std::uintptr_t where) {
  vlprune::RetrievalRank args{};
  args.query = query;
  args.gallery = gallery;
  args.positives = positives;
  args.best = best;
  args.rank = rank;
  args.split = split;
  args.norm = norm;
  args.listed = listed;
  args.capacity = listed.size(0) - 1;
  args.v = query.size(0);
  args.n = query.size(1);
  args.m = gallery.size(1);
  args.d = query.size(2);
  args.p = positives.size(1);
  args.shared_gallery = gallery.size(0) == 1;
  args.dtype = query.dtype;
  launch<Launch>(args, where);
}

template <auto Launch>
void column_norm_sq(const Tensor& acc, const Tensor& x, const Tensor& token_weight, const Tensor& partial,
                    std::uintptr_t where) {
  vlprune::ColumnNormSq args{};
  args.acc = acc;
  args.x = x;
  args.token_weight = token_weight;
  args.partial = partial;
  args.n = x.size(0);
  args.in = x.size(1);
  args.x_stride = x.stride(0);
  args.dtype = x.dtype;
  launch<Launch>(args, where);
}

vlprune::Keys keys_of(const Tensor& weight, const Tensor& scale) {
  return {weight, scale, weight.size(0), weight.size(1), weight.stride(0), weight.dtype};
}

template <auto Launch>
void prune_smallest(const Tensor& weight, const Tensor& scale, const Tensor& mask, const Tensor& k_of_row, int64_t k,
                    std::uintptr_t where) {
  vlprune::PruneSmallest args{};
  args.keys = keys_of(weight, scale);
  args.weight = weight;
  args.mask = mask;
  args.k = k;
  args.k_of_row = k_of_row;
  launch<Launch>(args, where);
}

template <auto Launch>
void prune_nm(const Tensor& weight, const Tensor& scale, const Tensor& mask, int64_t n, int64_t m,
              std::uintptr_t where) {
  vlprune::PruneNM args{};
  args.keys = keys_of(weight, scale);
  args.weight = weight;
  args.mask = mask;
  args.n = n;
  args.m = m;
  launch<Launch>(args, where);
}

template <auto Launch>
void key_histogram(const Tensor& weight, const Tensor& scale, const Tensor& counts, const Tensor& prefix, int64_t level,
                   std::uintptr_t where) {
  vlprune::KeyHistogram args{};
  args.keys = keys_of(weight, scale);
  args.counts = counts;
  args.prefix = prefix;
  args.level = level;
  launch<Launch>(args, where);
}

template <auto Launch>
void count_keys(const Tensor& weight, const Tensor& scale, const Tensor& threshold, const Tensor& below,
                const Tensor& equal, std::uintptr_t where) {
  vlprune::CountKeys args{};
  args.keys = keys_of(weight, scale);
  args.threshold = threshold;
  args.below = below;
  args.equal = equal;
  launch<Launch>(args, where);
}

template <auto Launch>
void perturb(const Tensor& weight, const Tensor& plus, const Tensor& minus, uint64_t seed, uint64_t tensor, float eps,
             std::uintptr_t where) {
  vlprune::Perturb args{};
  args.weight = weight;
  args.plus = plus;
  args.minus = minus;
  args.count = weight.count();
  args.seed = seed;
  args.tensor = tensor;
  args.eps = eps;
  args.dtype = weight.dtype;
  launch<Launch>(args, where);
}

template <auto Launch>
void attention_importance(const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& head_weight,
                          const Tensor& query_weight, const Tensor& key_mask, const Tensor& partial, const Tensor& out,
                          float scale, bool max, bool causal, std::uintptr_t where) {
  vlprune::AttentionImportance args{};
  args.q = q;
  args.k = k;
  args.lse = lse;
  args.head_weight = head_weight;
  args.query_weight = query_weight;
  args.key_mask = key_mask;
  args.partial = partial;
  args.out = out;
  args.b = q.size(0);
  args.h = q.size(1);
  args.hkv = k.size(1);
  args.tq = q.size(2);
  args.tk = k.size(2);
  args.d = q.size(3);
  args.parts = partial.size(0);
  for (int i = 0; i < 3; ++i) {
    args.q_strides[i] = q.stride(i);
    args.k_strides[i] = k.stride(i);
  }
  args.head_weight_stride = head_weight.size(0) > 1 ? head_weight.stride(0) : 0;
  args.scale = scale;
  args.max = max;
  args.causal = causal;
  args.dtype = q.dtype;
  launch<Launch>(args, where);
}

template <auto Launch>
void select_tokens(const Tensor& score, const Tensor& protect, const Tensor& index, std::uintptr_t where) {
  vlprune::SelectTokens args{};
  args.score = score;
  args.protect = protect;
  args.index = index;
  args.rows = score.size(0);
  args.tokens = score.size(1);
  args.keep = index.size(1);
  args.score_stride = score.stride(0);
  args.protect_stride = protect.stride(0);
  args.dtype = score.dtype;
  launch<Launch>(args, where);
}

template <auto Launch>
void diverse_tokens(const Tensor& x, const Tensor& candidate, const Tensor& keep_of_sample, const Tensor& kept,
                    const Tensor& gram, const Tensor& scale, const Tensor& closest, int64_t keep,
                    std::uintptr_t where) {
  vlprune::DiverseTokens args{};
  args.x = x;
  args.candidate = candidate;
  args.keep_of_sample = keep_of_sample;
  args.kept = kept;
  args.gram = gram;
  args.scale = scale;
  args.closest = closest;
  args.batch = x.size(0);
  args.tokens = x.size(1);
  args.d = x.size(2);
  args.keep = keep;
  args.batch_stride = x.stride(0);
  args.token_stride = x.stride(1);
  args.dtype = x.dtype;
  launch<Launch>(args, where);
}

// What is read, as bytes [B or 1, outer, T, inner, run], and what is written, as _native.py's _token_tensor() gives
// them.
using TokenPair = std::pair<Tensor, Tensor>;

std::vector<vlprune::TokenTensor> token_tensors(const std::vector<TokenPair>& pairs) {
  std::vector<vlprune::TokenTensor> tensors;
  tensors.reserve(pairs.size());
  for (const auto& [in, out] : pairs)
    tensors.push_back({in, out, in.size(1), in.size(3), in.size(4), in.size(0) > 1 ? in.stride(0) : 0, in.stride(1),
                       in.stride(2), in.stride(3)});
  return tensors;
}

template <auto Launch>
void compact_tokens(const Tensor& index, const std::vector<TokenPair>& pairs, std::uintptr_t where) {
  const std::vector<vlprune::TokenTensor> tensors = token_tensors(pairs);
  vlprune::CompactTokens args{};
  args.index = index;
  args.tensors = tensors.data();
  args.count = static_cast<int64_t>(tensors.size());
  args.batch = index.size(0);
  args.keep = index.size(1);
  args.tokens = pairs.at(0).first.size(2);
  launch<Launch>(args, where);
}

template <auto Launch>
void match_tokens(const Tensor& key, const Tensor& target, const Tensor& source, const Tensor& similarity,
                  const Tensor& match, const Tensor& lists, const Tensor& counts, const Tensor& inverse,
                  const Tensor& gathered, std::uintptr_t where) {
  vlprune::MatchTokens args{};
  args.key = key;
  args.target = target;
  args.source = source;
  args.similarity = similarity;
  args.match = match;
  args.lists = lists;
  args.counts = counts;
  args.inverse = inverse;
  args.gathered = gathered;
  args.b = key.size(0);
  args.t = key.size(1);
  args.d = key.size(2);
  args.slots = gathered.size(1);
  args.depth = gathered.size(2);
  args.key_strides[0] = key.stride(0);
  args.key_strides[1] = key.stride(1);
  args.dtype = key.dtype;
  launch<Launch>(args, where);
}

template <auto Launch>
void merge_tokens(const Tensor& index, const Tensor& match, const Tensor& size, const Tensor& total,
                  const Tensor& lists, const Tensor& ends, const std::vector<TokenPair>& pairs, std::uintptr_t where) {
  const std::vector<vlprune::TokenTensor> tensors = token_tensors(pairs);
  std::vector<int32_t> dtypes;
  dtypes.reserve(pairs.size());
  for (const auto& pair : pairs) dtypes.push_back(static_cast<int32_t>(pair.second.dtype));
  vlprune::MergeTokens args{};
  args.index = index;
  args.match = match;
  args.size = size;
  args.total = total;
  args.lists = lists;
  args.ends = ends;
  args.tensors = tensors.data();
  args.dtypes = dtypes.data();
  args.count = static_cast<int64_t>(tensors.size());
  args.batch = index.size(0);
  args.keep = index.size(1);
  args.tokens = match.size(1);
  launch<Launch>(args, where);
}

}  // namespace

// VLPRUNE_FOR_EACH_OP(VLPRUNE_BIND, cuda) makes every launcher of vlprune::cuda a function of the py::module_ `cuda`.
#define VLPRUNE_BIND(op, Args, where) where.def(#op, &op<&vlprune::where::op>)
