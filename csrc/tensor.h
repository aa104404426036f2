// A tensor as the launchers of launchers.h receive it from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace vlprune {

// Arrives as the tuple (address, sizes, strides, dtype) of _native.py's _tensor(), or as None: a null pointer, no
// dimensions, every size and stride 0. Sizes and strides stay Python's numbers until they are asked for, since most
// never are; only with the GIL held may they be.
struct Tensor {
  std::uintptr_t address = 0;
  pybind11::tuple sizes, strides;  // in elements
  DType dtype = DType::kFloat32;   // no value of the enum for another element type

  // To the type of pointer that the op's struct has.
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }

  int64_t size(std::size_t dim) const { return sizes.empty() ? 0 : sizes[dim].cast<int64_t>(); }
  int64_t stride(std::size_t dim) const { return strides.empty() ? 0 : strides[dim].cast<int64_t>(); }
  int64_t count() const {
    int64_t product = 1;
    for (std::size_t dim = 0; dim < sizes.size(); ++dim) product *= size(dim);
    return product;
  }
};

}  // namespace vlprune

template <>
struct pybind11::detail::type_caster<vlprune::Tensor> {
  PYBIND11_TYPE_CASTER(vlprune::Tensor, const_name("tuple | None"));

  bool load(handle source, bool /* convert */) {
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source)) return false;
    const auto fields = reinterpret_borrow<tuple>(source);
    value.address = fields[0].cast<std::uintptr_t>();
    value.sizes = fields[1];
    value.strides = fields[2];
    value.dtype = static_cast<vlprune::DType>(fields[3].cast<int>());
    return true;
  }
};
