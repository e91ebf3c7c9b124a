// Checks of `eri::cross_attention` and `eri::cross_attention_backward` and their CUDA
// implementation; the schemas are in eri/layers/cross_attention.py.

#include "cross_attention.h"

#include <vector>

#include "op.h"

namespace eri {
namespace {

const Op op = {"cross_attention"};

void check(const char* name, const Tensor& found, const Tensor& q) {
  op.check_kind(name, found, q.get_device_index(), q.scalar_type());
  STD_TORCH_CHECK(found.dim() == 3 && found.numel() > 0 && found.size(0) == q.size(0),
                  "cross_attention: ", name, " has ", found.dim(), " dimensions and ",
                  found.numel(), " elements, expected 3, and as many samples as q");
}

// Rows of keys and values that may lie apart; the numbers from one to the next.
int check_words(const char* name, const Tensor& found, const Tensor& q) {
  check(name, found, q);
  STD_TORCH_CHECK(found.size(2) == 2 * q.size(2) && found.size(1) <= kCrossAttentionKeys,
                  "cross_attention: ", name, " is [", found.size(0), ", ", found.size(1), ", ",
                  found.size(2), "], expected at most ", kCrossAttentionKeys, " rows of ",
                  2 * q.size(2));
  const int64_t stride =
      op.check_rows(name, found, found.size(0) * found.size(1), found.size(2));
  STD_TORCH_CHECK(kCrossAttentionKeys * stride < (1LL << 31), "cross_attention: ", name,
                  " has rows ", stride, " elements apart, expected fewer than 2^23");
  STD_TORCH_CHECK(found.numel() < (1LL << 31), "cross_attention: ", name, " has ", found.numel(),
                  " elements, expected fewer than 2^31");
  return static_cast<int>(stride);
}

// All that follows from q, kv, the number of heads and the tail of the result.
CrossAttentionArguments arguments_of(const Tensor& q, const Tensor& kv, int64_t heads,
                                     int64_t tail) {
  CrossAttentionArguments arguments = {};
  arguments.type = op.float_type("q", q);
  STD_TORCH_CHECK(arguments.type != FloatType::kFloat,
                  "cross_attention: q is of type Float, expected float16 or bfloat16");
  check("q", q, q);
  op.check_dense("q", q, q.numel());
  const int64_t width = q.size(2);
  const int64_t size = heads > 0 && width % heads == 0 ? width / heads : 0;
  STD_TORCH_CHECK(size == 40 || size == 64 || size == 80 || size == 160, "cross_attention: ", heads,
                  " heads of rows of ", width, " numbers, expected heads of 40, 64, 80 or 160");
  arguments.kv_stride = check_words("kv", kv, q);
  op.check_tail(tail, arguments.type);
  STD_TORCH_CHECK(q.size(0) * q.size(1) * (width + tail) < (1LL << 31), "cross_attention: q has ",
                  q.numel(), " elements, expected fewer than 2^31, tails included");
  arguments.q = q.const_data_ptr();
  arguments.kv = kv.const_data_ptr();
  arguments.batch = static_cast<int>(q.size(0));
  arguments.queries = static_cast<int>(q.size(1));
  arguments.keys = static_cast<int>(kv.size(1));
  arguments.heads = static_cast<int>(heads);
  arguments.size = static_cast<int>(size);
  arguments.result_stride = static_cast<int>(width + tail);
  return arguments;
}

Tensor result_of(const Tensor& q, int64_t tail) {
  const std::vector<int64_t> sizes = {q.size(0) * q.size(1), q.size(2) + tail};
  return torch::stable::new_empty(q, sizes);
}

Tensor cross_attention(const Tensor& q, const Tensor& kv, int64_t heads, int64_t tail) {
  CrossAttentionArguments arguments = arguments_of(q, kv, heads, tail);
  const DeviceGuard guard(q.get_device_index());
  Tensor o = result_of(q, tail);
  arguments.result = o.mutable_data_ptr();
  op.check_launch(launch_cross_attention(arguments, current_stream(q.get_device_index())));
  return o;
}

Tensor cross_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& kv,
                                const Tensor& dkv, int64_t heads, int64_t tail) {
  CrossAttentionArguments arguments = arguments_of(q, kv, heads, tail);
  check("d_o", d_o, q);
  STD_TORCH_CHECK(d_o.numel() == q.numel() && d_o.size(2) == q.size(2),
                  "cross_attention: d_o has ", d_o.numel(), " elements, expected the shape of q");
  op.check_dense("d_o", d_o, q.numel());
  arguments.dkv_stride = check_words("dkv", dkv, q);
  STD_TORCH_CHECK(dkv.size(1) == kv.size(1), "cross_attention: dkv has ", dkv.size(1),
                  " rows of a sample, kv ", kv.size(1));
  STD_TORCH_CHECK(dkv.size(0) * dkv.size(1) < 2 || arguments.dkv_stride >= dkv.size(2),
                  "cross_attention: dkv has rows that share memory");
  const DeviceGuard guard(q.get_device_index());
  int64_t work = 0;
  op.check_launch(plan_cross_attention_backward(arguments, &work));
  const std::vector<int64_t> of_work = {work};
  Tensor scratch = torch::stable::new_empty(q, of_work, ScalarType::Float);
  Tensor dq = result_of(q, tail);
  arguments.d_o = d_o.const_data_ptr();
  arguments.work = static_cast<float*>(scratch.mutable_data_ptr());
  arguments.result = dq.mutable_data_ptr();
  arguments.dkv = dkv.mutable_data_ptr();
  op.check_launch(launch_cross_attention_backward(arguments, current_stream(q.get_device_index())));
  return dq;
}

}  // namespace
}  // namespace eri

STABLE_TORCH_LIBRARY_IMPL(eri, CUDA, m) {
  m.impl("cross_attention", TORCH_BOX(&eri::cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&eri::cross_attention_backward));
}
