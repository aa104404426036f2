// counts[digit(key[i, j])] += 1 for every key that begins with `prefix`; digits are bits 30..20, 19..10, 9..0
//
// Grid    one block per resident slot of the device.
// Block   512 threads with kCopies histograms of 32-bit counters in shared memory; their sums, where not zero, are
//         added to counts when all keys are done. Integer atomics: any order, the same bits.
// Warp    every n-th piece of a row, 64 vectors, where n is the number of warps.
// Thread  two vectors of a piece.
//
// Contention: at level 0 a bin is an eighth of an octave, and Gaussian weights lie in some 30 to 40 of the bins, in ten
// of them most. Lane l uses copy l % kCopies, and the copies of a bin lie in neighbouring banks, so that about two
// lanes of a warp meet in a bank, be it in one counter or in two.
//
// Moves out in elements once. Per key some 4 instructions to load, 5 to count, and a shared atomic.
#include <algorithm>
#include <cstdint>

#include "check.cuh"
#include "keys.cuh"
#include "launch.cuh"
#include "ops.h"

namespace vlprune::cuda {
namespace {

constexpr int kThreads = 512, kCopies = 4;
constexpr int kVectorsPerThread = 2, kVectorsPerPiece = 32 * kVectorsPerThread;

template <typename T>
struct Params {
  KeyMatrix<T> keys;
  unsigned long long* counts;  // [kHistogramBins]
  const int64_t* prefix;       // [1], not read where high = 31
  int high, shift;             // the digit is bits high-1 .. shift
  int pieces;                  // per row
  int64_t row_step;            // row_step * pieces + piece_step = the number of warps
  int piece_step;
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) key_histogram_kernel(const Params<T> p) {
  __shared__ uint32_t bins[kHistogramBins][kCopies];
  for (int i = threadIdx.x; i < kHistogramBins * kCopies; i += kThreads) bins[i / kCopies][i % kCopies] = 0;
  __syncthreads();

  const uint32_t prefix = p.high == 31 ? 0 : static_cast<uint32_t>(*p.prefix) << p.high;
  const int lane = threadIdx.x % 32, copy = lane % kCopies;
  const int64_t warp = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  int64_t row_index = warp / p.pieces;
  int piece = static_cast<int>(warp % p.pieces);
  while (row_index < p.keys.rows) {
    const KeyRow<T> row = p.keys.row(row_index);
    const int vectors = row.vectors();
    uint32_t key[kVectorsPerThread][kVector<T>];
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const int vector = piece * kVectorsPerPiece + v * 32 + lane;
      row.load_keys(row.column(min(vector, vectors)), key[v]);  // vectors: none inside
    }
#pragma unroll
    for (int v = 0; v < kVectorsPerThread; ++v) {
#pragma unroll
      for (int e = 0; e < kVector<T>; ++e) {
        const uint32_t rest = key[v][e] ^ prefix;
        if (rest >> p.high == 0) atomicAdd(&bins[rest >> p.shift][copy], 1u);
      }
    }
    row_index += p.row_step;
    piece += p.piece_step;
    if (piece >= p.pieces) piece -= p.pieces, ++row_index;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kHistogramBins; i += kThreads) {
    unsigned long long sum = 0;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) sum += bins[i][c];
    if (sum > 0) atomicAdd(&p.counts[i], sum);
  }
}

}  // namespace

void key_histogram(const KeyHistogram& args, void* stream) {
  if (args.keys.out == 0 || args.keys.in == 0) return;
  dispatch(args.keys.dtype, [&](auto tag) {
    using T = typename ElementOf<decltype(tag)>::type;
    const KeyMatrix<T> keys(args.keys);
    const int64_t most_vectors = ceil_div(args.keys.in + (keys.aligned_rows() ? 0 : kVector<T> - 1), kVector<T>);
    const int64_t pieces = ceil_div(most_vectors, kVectorsPerPiece);
    const int64_t slots = resident_blocks(key_histogram_kernel<T>, kThreads, 0, "key_histogram");
    const int64_t blocks = std::min(slots, ceil_div(args.keys.out * pieces, kThreads / 32));
    const int64_t warps = blocks * (kThreads / 32);
    const int high = args.level == 0 ? 31 : args.level == 1 ? 20 : 10;
    const int shift = args.level == 0 ? 20 : args.level == 1 ? 10 : 0;
    const Params<T> p = {keys,           reinterpret_cast<unsigned long long*>(args.counts),
                         args.prefix,    high,
                         shift,          static_cast<int>(pieces),
                         warps / pieces, static_cast<int>(warps % pieces)};
    key_histogram_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    VLPRUNE_CHECK_LAUNCH("key_histogram");
  });
}

}  // namespace vlprune::cuda
