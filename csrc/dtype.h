// The element types that every kernel takes, and the one switch over them.
#pragma once

#include <cstdint>
#include <stdexcept>

namespace vlprune {

// Values are part of the contract with vlprune_ext/_native.py.
enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

template <DType>
struct DTypeTag {};

// Calls `f(DTypeTag<...>{})` for the run-time value `dtype`; cpu/ and cuda/ map the tag to their own element type.
template <typename F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f(DTypeTag<DType::kFloat32>{});
    case DType::kFloat16: return f(DTypeTag<DType::kFloat16>{});
    case DType::kBFloat16: return f(DTypeTag<DType::kBFloat16>{});
  }
  throw std::invalid_argument("vlprune: unknown dtype");
}

}  // namespace vlprune
