// The Python module _C: two submodules of launchers, _C.cpu and (where CUDA was built) _C.cuda, and what was built.
// Addresses arrive as integers from vlprune_ext/_native.py, which has checked everything about them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "ops.h"

namespace py = pybind11;
using vlprune::DType;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// `where` is the thread count for the CPU and the stream's address for CUDA.
template <auto Launch, typename Where>
void leave_one_out(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t base, std::uintptr_t out,
                   const std::vector<int64_t>& groups, int64_t n, int64_t d, int64_t group_size, int64_t x_stride,
                   int64_t weight_stride, int64_t base_stride, int dtype, Where where) {
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
  py::gil_scoped_release release;
  if constexpr (std::is_same_v<Where, int>) {
    Launch(args, where);
  } else {
    Launch(args, pointer<void>(where));
  }
}

template <auto Launch, typename Where>
void retrieval_rank(std::uintptr_t query, std::uintptr_t gallery, std::uintptr_t positives, std::uintptr_t best,
                    std::uintptr_t rank, int64_t v, int64_t n, int64_t m, int64_t d, int64_t p, bool shared_gallery,
                    int dtype, Where where) {
  vlprune::RetrievalRank args{};
  args.query = pointer<const void>(query);
  args.gallery = pointer<const void>(gallery);
  args.positives = pointer<const int64_t>(positives);
  args.best = pointer<float>(best);
  args.rank = pointer<int32_t>(rank);
  args.v = v;
  args.n = n;
  args.m = m;
  args.d = d;
  args.p = p;
  args.shared_gallery = shared_gallery;
  args.dtype = static_cast<DType>(dtype);
  py::gil_scoped_release release;
  if constexpr (std::is_same_v<Where, int>) {
    Launch(args, where);
  } else {
    Launch(args, pointer<void>(where));
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of vlprune_ext; called through vlprune_ext.ops.";

  py::module_ cpu = m.def_submodule("cpu", "Launchers for CPU tensors; the last argument is the number of threads.");
  cpu.def("leave_one_out", &leave_one_out<&vlprune::cpu::leave_one_out, int>);
  cpu.def("retrieval_rank", &retrieval_rank<&vlprune::cpu::retrieval_rank, int>);
  cpu.def("isa", [] { return std::string(vlprune::cpu::isa_name(vlprune::cpu::isa())); });
  cpu.def("available_isas", [] {
    using vlprune::cpu::Isa;
    std::vector<std::string> names;
    for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512})
      if (vlprune::cpu::isa_available(isa)) names.emplace_back(vlprune::cpu::isa_name(isa));
    return names;
  });
  cpu.def("force_isa", [](const std::string& name) { vlprune::cpu::force_isa(name.c_str()); });

  m.attr("compiler") = __VERSION__;
#if VLPRUNE_CUDA_BUILT
  py::module_ cuda = m.def_submodule("cuda", "Launchers for CUDA tensors; the last argument is the stream's address.");
  cuda.def("leave_one_out", &leave_one_out<&vlprune::cuda::leave_one_out, std::uintptr_t>);
  cuda.def("retrieval_rank", &retrieval_rank<&vlprune::cuda::retrieval_rank, std::uintptr_t>);
  m.attr("cuda_built") = true;
  m.attr("cuda_version") = VLPRUNE_CUDA_VERSION;
  m.attr("cuda_archs") = VLPRUNE_CUDA_ARCHS;
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::none();
#endif
}
