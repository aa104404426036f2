// out[b, :, k, :] = in[b, :, index[b, k], :] for each of some tensors
//
// Work is, tensor after tensor, the sequence of pieces of token_pieces.h, dealt out to the threads. Runs of up to 16
// bytes are copied by a move or two, longer ones by memcpy. Bytes moved: what is kept read and written once.
#include "cpu/isa.h"
#include "cpu/simd.h"
#include "cpu/token_pieces.h"

namespace vlprune::cpu::VLPRUNE_ISA {
namespace {

constexpr int64_t kAhead = 4, kPrefetched = 512;  // tokens, bytes of each

// kRun: the bytes of a run; 0 for any number.
template <int64_t kRun>
void copy_tokens(const TokenTensor& tensor, const char* in, const int64_t* index, int64_t count, char* out) {
  for (int64_t k = 0; k < count; ++k) {
    if constexpr (kRun == 0) {  // where a jump comes, which the machine's own prefetching does not follow
      const char* const next = in + index[k + kAhead < count ? k + kAhead : k] * tensor.token_stride;
      for (int64_t byte = 0; byte < tensor.run && byte < kPrefetched; byte += 64) __builtin_prefetch(next + byte);
    }
    const char* const token = in + index[k] * tensor.token_stride;
    for (int64_t i = 0; i < tensor.inner; ++i) {
      const char* const run = token + i * tensor.inner_stride;
      if constexpr (kRun > 0) {
        std::memcpy(out, run, kRun);
      } else {
        std::memcpy(out, run, size_t(tensor.run));
      }
      out += kRun > 0 ? kRun : tensor.run;
    }
  }
}

void copy_tokens(const TokenTensor& tensor, const char* in, const int64_t* index, int64_t count, char* out) {
  switch (tensor.run) {
    case 1: return copy_tokens<1>(tensor, in, index, count, out);
    case 2: return copy_tokens<2>(tensor, in, index, count, out);
    case 4: return copy_tokens<4>(tensor, in, index, count, out);
    case 8: return copy_tokens<8>(tensor, in, index, count, out);
    case 16: return copy_tokens<16>(tensor, in, index, count, out);
    default: return copy_tokens<0>(tensor, in, index, count, out);
  }
}

}  // namespace

void compact_tokens(const CompactTokens& args, int threads) {
  for_each_piece(args.tensors, args.count, args.batch, args.keep, threads,
                 [&](int64_t t, int64_t b, int64_t k, int64_t count, const char* in, char* out) {
                   copy_tokens(args.tensors[t], in, args.index + b * args.keep + k, count, out);
                 });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
