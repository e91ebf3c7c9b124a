// Checks of `eri::cross_attention` and `eri::cross_attention_backward` and their CUDA
// implementation; the schemas are in eri/layers/cross_attention.py.

#include "cross_attention.h"

#include <tuple>
#include <vector>

#include "op.h"

namespace eri {
namespace {

const Op op = {"cross_attention"};

void check(const char* name, const Tensor& found, const Tensor& q) {
  op.check_kind(name, found, q.get_device_index(), q.scalar_type());
  op.check_dense(name, found, found.numel());
  STD_TORCH_CHECK(found.dim() == 3 && found.numel() > 0 && found.size(0) == q.size(0),
                  "cross_attention: ", name, " has ", found.dim(), " dimensions and ",
                  found.numel(), " elements, expected 3, and as many samples as q");
}

// All that follows from q, kv and the number of heads.
CrossAttentionArguments arguments_of(const Tensor& q, const Tensor& kv, int64_t heads) {
  CrossAttentionArguments arguments = {};
  arguments.type = op.float_type("q", q);
  STD_TORCH_CHECK(arguments.type != FloatType::kFloat,
                  "cross_attention: q is of type Float, expected float16 or bfloat16");
  check("q", q, q);
  check("kv", kv, q);
  const int64_t width = q.size(2);
  const int64_t size = heads > 0 && width % heads == 0 ? width / heads : 0;
  STD_TORCH_CHECK(size == 40 || size == 64 || size == 80 || size == 160, "cross_attention: ", heads,
                  " heads of rows of ", width, " numbers, expected heads of 40, 64, 80 or 160");
  STD_TORCH_CHECK(kv.size(2) == 2 * width && kv.size(1) <= kCrossAttentionKeys,
                  "cross_attention: kv is [", kv.size(0), ", ", kv.size(1), ", ", kv.size(2),
                  "], expected at most ", kCrossAttentionKeys, " rows of ", 2 * width);
  STD_TORCH_CHECK(q.numel() < (1LL << 31), "cross_attention: q has ", q.numel(),
                  " elements, expected fewer than 2^31");
  arguments.q = q.const_data_ptr();
  arguments.kv = kv.const_data_ptr();
  arguments.batch = static_cast<int>(q.size(0));
  arguments.queries = static_cast<int>(q.size(1));
  arguments.keys = static_cast<int>(kv.size(1));
  arguments.heads = static_cast<int>(heads);
  arguments.size = static_cast<int>(size);
  return arguments;
}

Tensor cross_attention(const Tensor& q, const Tensor& kv, int64_t heads) {
  CrossAttentionArguments arguments = arguments_of(q, kv, heads);
  const DeviceGuard guard(q.get_device_index());
  Tensor o = torch::stable::empty_like(q);
  arguments.o = o.mutable_data_ptr();
  op.check_launch(launch_cross_attention(arguments, current_stream(q.get_device_index())));
  return o;
}

std::tuple<Tensor, Tensor> cross_attention_backward(const Tensor& d_o, const Tensor& q,
                                                    const Tensor& kv, int64_t heads,
                                                    int64_t tail) {
  CrossAttentionArguments arguments = arguments_of(q, kv, heads);
  check("d_o", d_o, q);
  STD_TORCH_CHECK(d_o.numel() == q.numel() && d_o.size(2) == q.size(2),
                  "cross_attention: d_o has ", d_o.numel(), " elements, expected the shape of q");
  arguments.dq_stride = q.size(2) + tail;
  const int64_t rows = q.size(0) * q.size(1);
  STD_TORCH_CHECK(
      tail >= 0 && tail % 8 == 0 && q.size(1) * arguments.dq_stride < (1LL << 31),
      "cross_attention: a tail of ", tail, ", expected a multiple of 8, not less than 0");
  const DeviceGuard guard(q.get_device_index());
  const int64_t work = cross_attention_work(arguments);
  const std::vector<int64_t> of_work = {work};
  const std::vector<int64_t> of_dq = {rows, arguments.dq_stride};
  Tensor scratch = torch::stable::new_empty(q, of_work, ScalarType::Float);
  Tensor dq = torch::stable::new_empty(q, of_dq);
  Tensor dkv = torch::stable::empty_like(kv);
  arguments.d_o = d_o.const_data_ptr();
  arguments.work = static_cast<float*>(scratch.mutable_data_ptr());
  arguments.dq = dq.mutable_data_ptr();
  arguments.dkv = dkv.mutable_data_ptr();
  op.check_launch(launch_cross_attention_backward(arguments, current_stream(q.get_device_index())));
  return {dq, dkv};
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("cross_attention", TORCH_BOX(&eri::cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&eri::cross_attention_backward));
}
