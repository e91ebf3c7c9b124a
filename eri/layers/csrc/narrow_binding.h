// Checks of the narrow product that an op makes beside its rows.
#pragma once

#include <vector>

#include "narrow_arguments.h"
#include "op.h"

namespace eri {

// H [rows, ranks] of rows of `width` numbers like those of `beside`, for a kernel to write.
inline Tensor check_narrow(const Op& op, NarrowArguments& narrow, const Tensor& down, double scale,
                           int64_t rows, int64_t width, const Tensor& beside) {
  STD_TORCH_CHECK(op.float_type("down", down) != FloatType::kFloat, op.name,
                  ": down is of type Float, expected float16 or bfloat16");
  op.check_kind("down", down, beside.get_device_index(), beside.scalar_type());
  narrow.ranks = down.dim() == 2 ? down.size(0) : 0;
  STD_TORCH_CHECK(narrow.ranks > 0 && narrow.ranks % 8 == 0 && narrow.ranks <= kNarrowRanks,
                  op.name, ": down has ", narrow.ranks, " rows, expected a multiple of 8 up to ",
                  kNarrowRanks);
  narrow.down_stride = op.check_rows("down", down, narrow.ranks, width);
  narrow.down = down.const_data_ptr();
  narrow.scale = static_cast<float>(scale);
  const std::vector<int64_t> sizes = {rows, narrow.ranks};
  Tensor hidden = torch::stable::new_empty(beside, sizes);
  narrow.hidden = hidden.mutable_data_ptr();
  return hidden;
}

}  // namespace eri
