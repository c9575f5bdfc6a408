// A mock CUDA device for PyTorch's CPU build: see sitecustomize.py beside this file.
//
// A tensor of device "cuda" is a tensor of that type whose bytes lie in host memory. An operator that gets one is looked
// at here: do all its tensors lie on the device, as a GPU demands? Then it is computed by the CPU's kernel on the same
// bytes. Views, autograd, autocast and modules are PyTorch's own.

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <map>
#include <set>

static const auto GPU = c10::DeviceType::CUDA;
static const auto KEY = c10::DispatchKeySet(c10::DispatchKey::CUDA);
static std::map<std::string, int64_t> calls;  // of each operator, and copies by direction
static std::set<const void*> pinned;
static size_t alive = 0, peak = 0, limit = 0;  // bytes; no limit if 0

// ---- Memory: counted in blocks of 512 bytes as a GPU's is, and refused above the limit ----

static void release(void* p) {
  auto* head = static_cast<size_t*>(p) - 8;
  alive -= head[0];
  c10::free_cpu(head);
}

struct CountedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = (std::max<size_t>(bytes, 1) + 511) / 512 * 512;
    if (limit && alive + size > limit) {
      const auto message = c10::str("CUDA out of memory, on the mock device: ", size, " bytes more than ", alive, " of ", limit);
      throw c10::OutOfMemoryError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, message);
    }
    auto* head = static_cast<size_t*>(c10::alloc_cpu(size + 64));
    head[0] = size;
    alive += size;
    peak = std::max(peak, alive);
    return {head + 8, head + 8, &release, c10::Device(GPU, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
static CountedMemory memory;
REGISTER_ALLOCATOR(GPU, &memory);

// ---- One device, one stream ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream only() const { return c10::Stream(c10::Stream::DEFAULT, {GPU, 0}); }
  c10::DeviceType type() const override { return GPU; }
  c10::Device exchangeDevice(c10::Device) const override { return {GPU, 0}; }
  c10::Device getDevice() const override { return {GPU, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  bool isPinnedPtr(const void* p) const override { return pinned.count(p); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void init() const override {}
};

// ---- Operators ----

static bool on_gpu(const at::Tensor& x) { return x.defined() && x.device().type() == GPU; }

// the same bytes as a tensor of the host
static at::Tensor on_host(const at::Tensor& x) {
  return on_gpu(x) ? at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU)) : x;
}

// what the host's kernel made, moved to the device
static at::Tensor moved(const at::Tensor& x) {
  if (!x.defined() || on_gpu(x)) return x;
  at::Tensor y = at::detail::empty_strided_generic(x.sizes(), x.strides(), &memory, KEY, x.scalar_type());
  on_host(y).copy_(x);
  return y;
}

template <typename F>
static c10::IValue for_tensors(const c10::IValue& value, F change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& x : value.toTensorList()) list.push_back(change(x));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& x : value.toOptionalTensorList())
      list.push_back(x ? std::optional<at::Tensor>(change(*x)) : x);
    return list;
  }
  return value;
}

static bool is_written(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

static void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  // a GPU's operators take numbers of the host, and these take its indices
  static const std::set<std::string> WITH_INDICES = {
      "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index",
      "aten::_unsafe_index_put"};
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  calls[schema.name()]++;
  std::vector<c10::IValue> given(stack->end() - arguments.size(), stack->end());
  torch::jit::drop(*stack, arguments.size());
  bool any_on_gpu = false;
  std::string elsewhere;
  for (size_t i = 0; i < given.size(); i++) {
    const auto& name = arguments[i].name();
    const bool may_be_on_host = WITH_INDICES.count(schema.name()) && name == "indices";
    TORCH_CHECK(!given[i].isGenerator(), schema.name(), ": a generator of the host for a tensor of the device");
    for_tensors(given[i], [&](const at::Tensor& x) {
      any_on_gpu |= on_gpu(x);
      if (x.defined() && !on_gpu(x) && x.dim() > 0 && !may_be_on_host) elsewhere += " " + name;
      return x;
    });
  }
  TORCH_CHECK(!any_on_gpu || elsewhere.empty(), "Expected all tensors to be on the same device: ", schema.name(),
              " has on the host", elsewhere);
  for (size_t i = 0; i < given.size(); i++) {
    const bool is_empty_output = is_written(arguments[i]) && given[i].isTensor() && on_gpu(given[i].toTensor()) &&
        given[i].toTensor().numel() == 0;
    if (is_empty_output)  // the kernel gives it its size
      stack->emplace_back(at::empty({0}, given[i].toTensor().options().device(at::kCPU)));
    else if (given[i].isDevice() && given[i].toDevice().type() == GPU)
      stack->emplace_back(c10::Device(at::kCPU));
    else
      stack->emplace_back(for_tensors(given[i], on_host));
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const auto& returns = schema.returns();
  std::vector<c10::IValue> made(stack->end() - returns.size(), stack->end());
  torch::jit::drop(*stack, returns.size());
  for (size_t j = 0; j < made.size(); j++) {
    if (!is_written(returns[j])) {
      stack->emplace_back(for_tensors(made[j], moved));
      continue;
    }
    for (size_t i = 0; i < given.size(); i++) {  // what was written is given back itself
      if (!is_written(arguments[i]) || !(*arguments[i].alias_info() == *returns[j].alias_info())) continue;
      if (given[i].isTensor() && on_gpu(given[i].toTensor()) && given[i].toTensor().sizes() != made[j].toTensor().sizes()) {
        given[i].toTensor().resize_(made[j].toTensor().sizes());
        on_host(given[i].toTensor()).copy_(made[j].toTensor());
      }
      stack->emplace_back(given[i]);
      break;
    }
  }
}

static at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                        std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEY, c10::dtype_or_default(dtype), format);
}

static at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                                std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEY, c10::dtype_or_default(dtype));
}

static at::Tensor& copy_(at::Tensor& self, const at::Tensor& from, bool) {
  calls[on_gpu(from) ? (on_gpu(self) ? "copy" : "copy to host") : "copy to device"]++;
  on_host(self).copy_(on_host(from));
  return self;
}

static at::Tensor& set_storage(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                               c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

static at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const int64_t count = storage.nbytes() / self.itemsize();
  return set_storage(self, storage, 0, {count}, {1});
}

static const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  const size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    auto larger = memory.allocate(bytes);
    std::memcpy(larger.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(larger));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

static at::Tensor& addmm_in(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype,
                            const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& out) {
  return out.copy_(at::addmm(self.to(dtype), a.to(dtype), b.to(dtype), beta, alpha));  // a GPU alone has it
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("copy_", &copy_);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("addmm.dtype_out", &addmm_in);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // PyTorch made its hooks when it was imported, those of a build without CUDA: they get the methods of these
  auto& own = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(&own) = *reinterpret_cast<void**>(new Hooks());
  at::globalContext().lazyInitDevice(GPU);
  m.def("calls", [] { return calls; });
  m.def("pin", [](size_t p) {
    TORCH_CHECK(pinned.insert(reinterpret_cast<const void*>(p)).second, "CUDA error: the memory is already mapped");
  });
  m.def("unpin", [](size_t p) { pinned.erase(reinterpret_cast<const void*>(p)); });
  m.def("alive", [] { return alive; });
  m.def("peak", [] { return peak; });
  m.def("reset_peak", [] { peak = alive; });
  m.def("set_limit", [](size_t bytes) { limit = bytes; });
}
