// Every launcher as a Python function. Addresses arrive as integers from vlprune_ext/_native.py, which has checked
// everything about them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace py = pybind11;
using vlprune::DType;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// `where` is the stream's address for CUDA and the number of threads for the CPU: one type, so that both functions of
// an op have one signature, which pybind11 compiles once.
template <auto Launch, typename Args>
void launch(const Args& args, std::uintptr_t where) {
  py::gil_scoped_release release;
  if constexpr (std::is_invocable_v<decltype(Launch), const Args&, void*>) {
    Launch(args, pointer<void>(where));
  } else {
    Launch(args, static_cast<int>(where));
  }
}

template <auto Launch>
void leave_one_out(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t base, std::uintptr_t out,
                   const std::vector<int64_t>& groups, int64_t n, int64_t d, int64_t group_size, int64_t x_stride,
                   int64_t weight_stride, int64_t base_stride, int dtype, std::uintptr_t where) {
  vlprune::LeaveOneOut args{};
  args.x = pointer<const void>(x);
  args.weight = pointer<const void>(weight);
  args.base = pointer<const void>(base);
  args.out = pointer<void>(out);
  args.groups = groups.data();
  args.n = n;
  args.d = d;
  args.v = static_cast<int64_t>(groups.size());
  args.group_size = group_size;
  args.x_stride = x_stride;
  args.weight_stride = weight_stride;
  args.base_stride = base_stride;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

template <auto Launch>
void retrieval_rank(std::uintptr_t query, std::uintptr_t gallery, std::uintptr_t positives, std::uintptr_t best,
                    std::uintptr_t rank, std::uintptr_t split, std::uintptr_t norm, std::uintptr_t listed,
                    int64_t capacity, int64_t v, int64_t n, int64_t m, int64_t d, int64_t p, bool shared_gallery,
                    int dtype, std::uintptr_t where) {
  vlprune::RetrievalRank args{};
  args.query = pointer<const void>(query);
  args.gallery = pointer<const void>(gallery);
  args.positives = pointer<const int64_t>(positives);
  args.best = pointer<float>(best);
  args.rank = pointer<int32_t>(rank);
  args.split = pointer<void>(split);
  args.norm = pointer<float>(norm);
  args.listed = pointer<uint64_t>(listed);
  args.capacity = capacity;
  args.v = v;
  args.n = n;
  args.m = m;
  args.d = d;
  args.p = p;
  args.shared_gallery = shared_gallery;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

template <auto Launch>
void column_norm_sq(std::uintptr_t acc, std::uintptr_t x, std::uintptr_t token_weight, std::uintptr_t partial,
                    int64_t n, int64_t in, int64_t x_stride, int dtype, std::uintptr_t where) {
  vlprune::ColumnNormSq args{};
  args.acc = pointer<float>(acc);
  args.x = pointer<const void>(x);
  args.token_weight = pointer<const float>(token_weight);
  args.partial = pointer<float>(partial);
  args.n = n;
  args.in = in;
  args.x_stride = x_stride;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

// (weight, scale, out, in, stride, dtype), as _native.py's _keys() gives them.
using KeysTuple = std::tuple<std::uintptr_t, std::uintptr_t, int64_t, int64_t, int64_t, int>;

vlprune::Keys keys_of(const KeysTuple& keys) {
  const auto& [weight, scale, out, in, stride, dtype] = keys;
  return {pointer<const void>(weight), pointer<const float>(scale), out, in, stride, static_cast<DType>(dtype)};
}

template <auto Launch>
void prune_smallest(const KeysTuple& keys, std::uintptr_t mask, int64_t k, std::uintptr_t k_of_row,
                    std::uintptr_t where) {
  vlprune::PruneSmallest args{};
  args.keys = keys_of(keys);
  args.weight = pointer<void>(std::get<0>(keys));
  args.mask = pointer<uint8_t>(mask);
  args.k = k;
  args.k_of_row = pointer<const int64_t>(k_of_row);
  launch<Launch>(args, where);
}

template <auto Launch>
void prune_nm(const KeysTuple& keys, std::uintptr_t mask, int64_t n, int64_t m, std::uintptr_t where) {
  vlprune::PruneNM args{};
  args.keys = keys_of(keys);
  args.weight = pointer<void>(std::get<0>(keys));
  args.mask = pointer<uint8_t>(mask);
  args.n = n;
  args.m = m;
  launch<Launch>(args, where);
}

template <auto Launch>
void key_histogram(const KeysTuple& keys, std::uintptr_t counts, std::uintptr_t prefix, int64_t level,
                   std::uintptr_t where) {
  vlprune::KeyHistogram args{};
  args.keys = keys_of(keys);
  args.counts = pointer<int64_t>(counts);
  args.prefix = pointer<const int64_t>(prefix);
  args.level = level;
  launch<Launch>(args, where);
}

template <auto Launch>
void count_keys(const KeysTuple& keys, std::uintptr_t threshold, std::uintptr_t below, std::uintptr_t equal,
                std::uintptr_t where) {
  vlprune::CountKeys args{};
  args.keys = keys_of(keys);
  args.threshold = pointer<const int64_t>(threshold);
  args.below = pointer<int64_t>(below);
  args.equal = pointer<int64_t>(equal);
  launch<Launch>(args, where);
}

template <auto Launch>
void perturb(std::uintptr_t weight, std::uintptr_t plus, std::uintptr_t minus, int64_t count, uint64_t seed,
             uint64_t tensor, float eps, int dtype, std::uintptr_t where) {
  vlprune::Perturb args{};
  args.weight = pointer<const void>(weight);
  args.plus = pointer<void>(plus);
  args.minus = pointer<void>(minus);
  args.count = count;
  args.seed = seed;
  args.tensor = tensor;
  args.eps = eps;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

// (batch, head, token)
using Strides = std::tuple<int64_t, int64_t, int64_t>;

template <auto Launch>
void attention_importance(std::uintptr_t q, std::uintptr_t k, std::uintptr_t lse, std::uintptr_t head_weight,
                          std::uintptr_t query_weight, std::uintptr_t key_mask, std::uintptr_t partial,
                          std::uintptr_t out, int64_t b, int64_t h, int64_t hkv, int64_t tq, int64_t tk, int64_t d,
                          int64_t parts, const Strides& q_strides, const Strides& k_strides, int64_t head_weight_stride,
                          float scale, bool max, bool causal, int dtype, std::uintptr_t where) {
  vlprune::AttentionImportance args{};
  args.q = pointer<const void>(q);
  args.k = pointer<const void>(k);
  args.lse = pointer<const float>(lse);
  args.head_weight = pointer<const float>(head_weight);
  args.query_weight = pointer<const float>(query_weight);
  args.key_mask = pointer<const uint8_t>(key_mask);
  args.partial = pointer<float>(partial);
  args.out = pointer<float>(out);
  args.b = b;
  args.h = h;
  args.hkv = hkv;
  args.tq = tq;
  args.tk = tk;
  args.d = d;
  args.parts = parts;
  std::tie(args.q_strides[0], args.q_strides[1], args.q_strides[2]) = q_strides;
  std::tie(args.k_strides[0], args.k_strides[1], args.k_strides[2]) = k_strides;
  args.head_weight_stride = head_weight_stride;
  args.scale = scale;
  args.max = max;
  args.causal = causal;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

template <auto Launch>
void select_tokens(std::uintptr_t score, std::uintptr_t protect, std::uintptr_t index, int64_t rows, int64_t tokens,
                   int64_t keep, int64_t score_stride, int64_t protect_stride, int dtype, std::uintptr_t where) {
  vlprune::SelectTokens args{};
  args.score = pointer<const void>(score);
  args.protect = pointer<const uint8_t>(protect);
  args.index = pointer<int64_t>(index);
  args.rows = rows;
  args.tokens = tokens;
  args.keep = keep;
  args.score_stride = score_stride;
  args.protect_stride = protect_stride;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

template <auto Launch>
void diverse_tokens(std::uintptr_t x, std::uintptr_t candidate, std::uintptr_t keep_of_sample, std::uintptr_t kept,
                    std::uintptr_t gram, std::uintptr_t scale, std::uintptr_t closest, int64_t batch, int64_t tokens,
                    int64_t d, int64_t keep, int64_t batch_stride, int64_t token_stride, int dtype,
                    std::uintptr_t where) {
  vlprune::DiverseTokens args{};
  args.x = pointer<const void>(x);
  args.candidate = pointer<const uint8_t>(candidate);
  args.keep_of_sample = pointer<const int64_t>(keep_of_sample);
  args.kept = pointer<uint8_t>(kept);
  args.gram = pointer<float>(gram);
  args.scale = pointer<float>(scale);
  args.closest = pointer<float>(closest);
  args.batch = batch;
  args.tokens = tokens;
  args.d = d;
  args.keep = keep;
  args.batch_stride = batch_stride;
  args.token_stride = token_stride;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

// (in, out, outer, inner, run, batch_stride, outer_stride, token_stride, inner_stride), as _native.py's _token_tensor()
// gives them.
using TokenTuple =
    std::tuple<std::uintptr_t, std::uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

std::vector<vlprune::TokenTensor> token_tensors(const std::vector<TokenTuple>& tuples) {
  std::vector<vlprune::TokenTensor> tensors;
  tensors.reserve(tuples.size());
  for (const auto& [in, out, outer, inner, run, batch_stride, outer_stride, token_stride, inner_stride] : tuples)
    tensors.push_back({pointer<const void>(in), pointer<void>(out), outer, inner, run, batch_stride, outer_stride,
                       token_stride, inner_stride});
  return tensors;
}

template <auto Launch>
void compact_tokens(std::uintptr_t index, const std::vector<TokenTuple>& tuples, int64_t batch, int64_t keep,
                    int64_t tokens, std::uintptr_t where) {
  const std::vector<vlprune::TokenTensor> tensors = token_tensors(tuples);
  vlprune::CompactTokens args{};
  args.index = pointer<const int64_t>(index);
  args.tensors = tensors.data();
  args.count = static_cast<int64_t>(tensors.size());
  args.batch = batch;
  args.keep = keep;
  args.tokens = tokens;
  launch<Launch>(args, where);
}

template <auto Launch>
void match_tokens(std::uintptr_t key, std::uintptr_t target, std::uintptr_t source, std::uintptr_t similarity,
                  std::uintptr_t match, std::uintptr_t lists, std::uintptr_t counts, std::uintptr_t inverse,
                  std::uintptr_t gathered, int64_t b, int64_t t, int64_t d, int64_t slots, int64_t depth,
                  int64_t batch_stride, int64_t token_stride, int dtype, std::uintptr_t where) {
  vlprune::MatchTokens args{};
  args.key = pointer<const void>(key);
  args.target = pointer<const uint8_t>(target);
  args.source = pointer<const uint8_t>(source);
  args.similarity = pointer<float>(similarity);
  args.match = pointer<int64_t>(match);
  args.lists = pointer<int32_t>(lists);
  args.counts = pointer<int32_t>(counts);
  args.inverse = pointer<float>(inverse);
  args.gathered = pointer<void>(gathered);
  args.b = b;
  args.t = t;
  args.d = d;
  args.slots = slots;
  args.depth = depth;
  args.key_strides[0] = batch_stride;
  args.key_strides[1] = token_stride;
  args.dtype = static_cast<DType>(dtype);
  launch<Launch>(args, where);
}

template <auto Launch>
void merge_tokens(std::uintptr_t index, std::uintptr_t match, std::uintptr_t size, std::uintptr_t total,
                  std::uintptr_t lists, std::uintptr_t ends, const std::vector<TokenTuple>& tuples,
                  const std::vector<int32_t>& dtypes, int64_t batch, int64_t keep, int64_t tokens,
                  std::uintptr_t where) {
  const std::vector<vlprune::TokenTensor> tensors = token_tensors(tuples);
  vlprune::MergeTokens args{};
  args.index = pointer<const int64_t>(index);
  args.match = pointer<const int64_t>(match);
  args.size = pointer<const float>(size);
  args.total = pointer<float>(total);
  args.lists = pointer<int32_t>(lists);
  args.ends = pointer<int32_t>(ends);
  args.tensors = tensors.data();
  args.dtypes = dtypes.data();
  args.count = static_cast<int64_t>(tensors.size());
  args.batch = batch;
  args.keep = keep;
  args.tokens = tokens;
  launch<Launch>(args, where);
}

}  // namespace

// Every launcher of a namespace, as functions of the submodule.
#define VLPRUNE_BIND(module, where)                                                                 \
  module.def("leave_one_out", &leave_one_out<&vlprune::where::leave_one_out>);                      \
  module.def("retrieval_rank", &retrieval_rank<&vlprune::where::retrieval_rank>);                   \
  module.def("column_norm_sq", &column_norm_sq<&vlprune::where::column_norm_sq>);                   \
  module.def("prune_smallest", &prune_smallest<&vlprune::where::prune_smallest>);                   \
  module.def("prune_nm", &prune_nm<&vlprune::where::prune_nm>);                                     \
  module.def("key_histogram", &key_histogram<&vlprune::where::key_histogram>);                      \
  module.def("count_keys", &count_keys<&vlprune::where::count_keys>);                               \
  module.def("perturb", &perturb<&vlprune::where::perturb>);                                        \
  module.def("attention_importance", &attention_importance<&vlprune::where::attention_importance>); \
  module.def("select_tokens", &select_tokens<&vlprune::where::select_tokens>);                      \
  module.def("diverse_tokens", &diverse_tokens<&vlprune::where::diverse_tokens>);                   \
  module.def("compact_tokens", &compact_tokens<&vlprune::where::compact_tokens>);                   \
  module.def("match_tokens", &match_tokens<&vlprune::where::match_tokens>);                         \
  module.def("merge_tokens", &merge_tokens<&vlprune::where::merge_tokens>)
