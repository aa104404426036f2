// The Python module _emulated: every launcher of vlprune::cuda, run by the emulator.
#include <cstdint>
#include <string>

#include "emulator.h"
#include "faults.h"
#include "launchers.h"

PYBIND11_MODULE(_emulated, m) {
  py::module_& cuda = m;
  VLPRUNE_FOR_EACH_OP(VLPRUNE_BIND, cuda);
  m.def("allow", &emulator::allow);
  m.def("forbid_all", &emulator::forbid_all);
  m.def("faults", [](const std::string& name, std::uintptr_t out, bool faulty) {
    faults::launch(name, reinterpret_cast<int32_t*>(out), faulty);
  });
}
