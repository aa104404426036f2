#include "cpu/element.h"
#include "cpu/isa.h"

namespace vlprune::cpu::VLPRUNE_ISA {

void retrieval_rank(const RetrievalRank& a, int threads) {
  dispatch(a.dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    const T* query = static_cast<const T*>(a.query);
    const T* gallery = static_cast<const T*>(a.gallery);
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t v = 0; v < a.v; ++v)
      for (int64_t n = 0; n < a.n; ++n) {
        const T* q = query + (v * a.n + n) * a.d;
        const T* g = gallery + (a.shared_gallery ? 0 : v * a.m * a.d);
        auto score = [&](int64_t m) {
          float sum = 0;
          for (int64_t k = 0; k < a.d; ++k) sum += to_float(q[k]) * to_float(g[m * a.d + k]);
          return sum;
        };
        bool first = true;
        float best = 0;
        for (int64_t p = 0; p < a.p; ++p) {
          const int64_t m = a.positives[n * a.p + p];
          if (m < 0) continue;
          const float s = score(m);
          if (first || s > best) best = s;
          first = false;
        }
        int64_t rank = 0;
        for (int64_t m = 0; m < a.m && rank >= 0; ++m) {
          const float s = score(m);
          if (s != s) rank = -1;
          else rank += s > best;
        }
        a.best[v * a.n + n] = best;
        a.rank[v * a.n + n] = int32_t(rank);
      }
  });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
