// The Python module _C: two submodules of launchers, _C.cpu and (where CUDA was built) _C.cuda, and what was built.
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "launchers.h"
#include "ops.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of vlprune_ext; called through vlprune_ext.ops.";

  py::module_ cpu = m.def_submodule("cpu", "Launchers for CPU tensors; the last argument is the number of threads.");
  VLPRUNE_FOR_EACH_OP(VLPRUNE_BIND, cpu);
  cpu.def("isa", [] { return std::string(vlprune::cpu::isa_name(vlprune::cpu::isa())); });
  cpu.def("available_isas", [] {
    using vlprune::cpu::Isa;
    std::vector<std::string> names;
    for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512})
      if (vlprune::cpu::isa_available(isa)) names.emplace_back(vlprune::cpu::isa_name(isa));
    return names;
  });
  cpu.def("force_isa", [](const std::string& name) { vlprune::cpu::force_isa(name.c_str()); });

  m.attr("split_depth") = vlprune::kSplitDepth;
  m.attr("norm_chunk") = vlprune::kNormChunk;
  m.attr("histogram_bins") = vlprune::kHistogramBins;
  m.attr("few_queries") = vlprune::kFewQueries;
  m.attr("merge_parts") = vlprune::kMergeParts;
  m.attr("compiler") = __VERSION__;
#if VLPRUNE_CUDA_BUILT
  py::module_ cuda = m.def_submodule("cuda", "Launchers for CUDA tensors; the last argument is the stream's address.");
  VLPRUNE_FOR_EACH_OP(VLPRUNE_BIND, cuda);
  m.attr("cuda_built") = true;
  m.attr("cuda_version") = VLPRUNE_CUDA_VERSION;
  m.attr("cuda_archs") = VLPRUNE_CUDA_ARCHS;
#else
  m.attr("cuda_built") = false;
  m.attr("cuda_version") = py::none();
  m.attr("cuda_archs") = py::none();
#endif
}
