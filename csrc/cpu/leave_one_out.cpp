#include "cpu/element.h"
#include "cpu/isa.h"

namespace vlprune::cpu::VLPRUNE_ISA {

void leave_one_out(const LeaveOneOut& a, int threads) {
  dispatch(a.dtype, [&](auto tag) {
    using T = Element<decltype(tag)>;
    const T* x = static_cast<const T*>(a.x);
    const T* w = static_cast<const T*>(a.weight);
    const T* base = static_cast<const T*>(a.base);
    T* out = static_cast<T*>(a.out);
#pragma omp parallel for num_threads(threads) collapse(2)
    for (int64_t i = 0; i < a.v; ++i)
      for (int64_t n = 0; n < a.n; ++n)
        for (int64_t d = 0; d < a.d; ++d) {
          const T* xr = x + n * a.x_stride + a.groups[i] * a.group_size;
          const T* wr = w + d * a.weight_stride + a.groups[i] * a.group_size;
          float sum = 0;
          for (int64_t k = 0; k < a.group_size; ++k) sum += to_float(xr[k]) * to_float(wr[k]);
          from_float(to_float(base[n * a.base_stride + d]) - sum, &out[(i * a.n + n) * a.d + d]);
        }
  });
}

}  // namespace vlprune::cpu::VLPRUNE_ISA
