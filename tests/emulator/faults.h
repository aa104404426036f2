#pragma once

#include <cstdint>
#include <string>

namespace faults {

// Runs a kernel of faults.cu: out [64] becomes 0, 1, .., 63 where it is not faulty.
void launch(const std::string& name, int32_t* out, bool faulty);

}  // namespace faults
