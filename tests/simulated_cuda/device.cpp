// A CUDA device made of threads and of the memory of the host: see __init__.py.
//
// What torch asks of a backend, by the interfaces that it has for those outside of its own source: hooks, a guard (devices,
// streams, events), an allocator, a few kernels, and the fallback to the CPU for all others.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/extension.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <thread>

namespace {

using Clock = std::chrono::steady_clock;

int count_of_devices() {
  const char* count = std::getenv("SIMULATED_CUDA_DEVICES");
  return count ? std::atoi(count) : 1;
}

// --- streams and events ------------------------------------------------------------------------------------------------

// Does what it is told in order, in a thread of its own.
class Queue {
 public:
  Queue() {
    std::thread([this] { run(); }).detach();
  }
  void put(std::function<void()> work) {
    std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(work));
    changed_.notify_all();
  }
  bool is_idle() {
    std::lock_guard lock(mutex_);
    return waiting_.empty() && !busy_;
  }
  void synchronize() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_.empty() && !busy_; });
  }

 private:
  void run() {
    c10::InferenceMode no_autograd;  // what it works on may have been made in it
    for (;;) {
      std::function<void()> work;
      {
        std::unique_lock lock(mutex_);
        busy_ = false;
        changed_.notify_all();
        changed_.wait(lock, [&] { return !waiting_.empty(); });
        work = std::move(waiting_.front());
        waiting_.pop_front();
        busy_ = true;
      }
      work();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> waiting_;
  bool busy_ = false;
};

std::mutex queues_mutex;
std::atomic<int64_t> next_stream{1};
thread_local int current_device = 0;
thread_local std::map<int, int64_t> current_streams;

auto& queues() {
  static auto* all = new std::map<std::pair<int, int64_t>, Queue*>();  // its threads run on while the process ends
  return *all;
}

Queue* queue(int device, int64_t stream) {
  std::lock_guard lock(queues_mutex);
  auto& found = queues()[{device, stream}];
  if (!found) found = new Queue();
  return found;
}

Queue* queue(const c10::Stream& stream) { return queue(stream.device_index(), stream.id()); }
Queue* current_queue(int device) { return queue(device, current_streams[device]); }
int index_of(c10::Device device) { return device.has_index() ? device.index() : current_device; }

void synchronize_current() {
  for (int device = 0; device < count_of_devices(); device++) {
    if (current_streams.count(device) || device == current_device) current_queue(device)->synchronize();
  }
}

struct Moment {
  void come() {
    std::lock_guard lock(mutex);
    at = Clock::now();
    has_come = true;
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return has_come; });
  }
  bool query() {
    std::lock_guard lock(mutex);
    return has_come;
  }
  std::mutex mutex;
  std::condition_variable changed;
  bool has_come = false;
  Clock::time_point at;
};

struct Event {
  std::shared_ptr<Moment> moment;  // of when it was recorded last
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return count_of_devices(); }
  c10::Device getDevice() const override { return {c10::kCUDA, static_cast<c10::DeviceIndex>(current_device)}; }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    current_device = index_of(device);
    return before;
  }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }

  static c10::Stream stream(int device, int64_t id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, device), id);
  }
  c10::Stream getStream(c10::Device device) const override {
    return stream(index_of(device), current_streams[index_of(device)]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(index_of(device), 0); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return stream(index_of(device), next_stream++);
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return stream(index_of(device), next_stream++); }
  c10::Stream exchangeStream(c10::Stream other) const override {
    auto before = getStream(other.device());
    current_streams[other.device_index()] = other.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override { return queue(stream)->is_idle(); }
  void synchronizeStream(const c10::Stream& stream) const override { queue(stream)->synchronize(); }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    std::vector<Queue*> all;
    {
      std::lock_guard lock(queues_mutex);
      for (auto& [key, one] : queues()) {
        if (key.first == device) all.push_back(one);
      }
    }
    for (auto* one : all) one->synchronize();
  }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event();
    auto moment = std::make_shared<Moment>();
    static_cast<Event*>(*event)->moment = moment;
    queue(stream)->put([moment] { moment->come(); });
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (auto moment = moment_of(event)) queue(stream)->put([moment] { moment->wait(); });
  }
  bool queryEvent(void* event) const override {
    auto moment = moment_of(event);
    return !moment || moment->query();
  }
  void synchronizeEvent(void* event) const override {
    if (auto moment = moment_of(event)) moment->wait();
  }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    return std::chrono::duration<double, std::milli>(moment_of(second)->at - moment_of(first)->at).count();
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  static std::shared_ptr<Moment> moment_of(void* event) { return event ? static_cast<Event*>(event)->moment : nullptr; }
};

class OnDevice {
 public:
  explicit OnDevice(c10::Device device) : before_(current_device) { current_device = index_of(device); }
  ~OnDevice() { current_device = before_; }

 private:
  int before_;
};

// --- memory ------------------------------------------------------------------------------------------------------------

std::atomic<int64_t> allocated{0};

struct Block {
  void* memory;
  size_t size;
  Queue* stream;
  std::vector<Queue*> also;  // record_stream
};

// As torch's caching one: what is freed is somebody else's at once, in the order of the stream that it was made on.
struct DeviceMemory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
    if (memory) std::memset(memory, 0xAB, size);
    allocated += size;
    auto* block = new Block{memory, size, current_queue(current_device), {}};
    return {memory, block, &free_block, Guard().getDevice()};
  }
  static void free_block(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    allocated -= block->size;
    for (auto* other : block->also) {
      auto moment = std::make_shared<Moment>();
      other->put([moment] { moment->come(); });
      block->stream->put([moment] { moment->wait(); });
    }
    if (!block->memory) return;
    block->stream->put([memory = block->memory, size = block->size] {
      std::memset(memory, 0xCD, size);
      std::free(memory);
    });
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_block; }
  void copy_data(void* target, const void* source, size_t size) const override {
    synchronize_current();
    std::memcpy(target, source, size);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    static_cast<Block*>(data.get_context())->also.push_back(queue(stream));
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override { return {}; }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
};
DeviceMemory allocator;

std::mutex pinned_mutex;
std::map<uintptr_t, size_t> pinned;  // size by address

bool is_pinned(const void* address) {
  std::lock_guard lock(pinned_mutex);
  auto above = pinned.upper_bound(reinterpret_cast<uintptr_t>(address));
  if (above == pinned.begin()) return false;
  auto [start, size] = *std::prev(above);
  return reinterpret_cast<uintptr_t>(address) < start + size;
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* memory = std::aligned_alloc(64, size / 64 * 64 + 64);
    std::lock_guard lock(pinned_mutex);
    pinned[reinterpret_cast<uintptr_t>(memory)] = size + 1;
    return {memory, memory, &free_memory, c10::Device(c10::kCPU)};
  }
  static void free_memory(void* memory) {
    std::lock_guard lock(pinned_mutex);
    pinned.erase(reinterpret_cast<uintptr_t>(memory));
    std::free(memory);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_memory; }
  void copy_data(void* target, const void* source, size_t size) const override { std::memcpy(target, source, size); }
};
PinnedMemory pinned_allocator;

// --- random numbers: the CPU's, from a state of each device's own ------------------------------------------------------

std::mutex random_mutex;
std::map<int, at::Tensor> random_states;

at::Tensor state_from(uint64_t seed) { return at::detail::createCPUGenerator(seed).get_state(); }

at::Tensor& random_state(int device) {
  auto found = random_states.find(device);
  if (found == random_states.end()) found = random_states.emplace(device, state_from(1)).first;
  return found->second;
}

struct DeviceGenerator : at::CPUGeneratorImpl {
  explicit DeviceGenerator(int device) { device_ = c10::Device(c10::kCUDA, device < 0 ? current_device : device); }
};

// --- kernels -----------------------------------------------------------------------------------------------------------

std::atomic<int64_t> copy_delay{0};  // microseconds that a copy to pinned memory takes at least

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  synchronize_current();
  auto autocast = c10::DispatchKeySet(c10::DispatchKey::AutocastCUDA) | c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);
  c10::impl::ExcludeDispatchKeyGuard no_autocast(autocast);
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return at::native::cpu_fallback(op, stack);
  std::lock_guard lock(random_mutex);
  auto generator = at::globalContext().defaultGenerator(at::Device(at::kCPU));
  auto before = generator.get_state();
  generator.set_state(random_state(current_device));
  at::native::cpu_fallback(op, stack);
  random_state(current_device) = generator.get_state();
  generator.set_state(before);
}

at::ScalarType type_of(std::optional<at::ScalarType> dtype) {
  return dtype.value_or(at::get_default_dtype_as_scalartype());
}

const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice on(device.value_or(at::Device(at::kCUDA)));
  return at::detail::empty_generic(size, &allocator, KEYS, type_of(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  OnDevice on(device.value_or(at::Device(at::kCUDA)));
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, type_of(dtype));
}

// The memory of a tensor of the device, without holding on to it.
at::Tensor seen_by_the_cpu(const at::Tensor& tensor) {
  auto* begin = static_cast<char*>(tensor.storage().mutable_data());
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(begin ? begin + tensor.storage_offset() * tensor.element_size() : nullptr, tensor.sizes(),
                       tensor.strides(), options);
}

at::Tensor& copy(at::Tensor& target, const at::Tensor& source, bool non_blocking) {
  if (!target.numel() && !source.numel()) return target;
  bool in = target.is_cuda(), out = source.is_cuda();
  auto* stream = current_queue(out ? source.device().index() : target.device().index());
  bool between = in && out && target.device() != source.device();
  bool beside = (in && out && !between) || (non_blocking && is_pinned((in ? source : target).const_data_ptr()));
  if (between) current_queue(target.device().index())->synchronize();
  auto to = in ? seen_by_the_cpu(target) : target.detach().alias();
  auto from = out ? seen_by_the_cpu(source) : source.detach().alias();
  auto delay = std::chrono::microseconds(!in && beside ? copy_delay.load() : 0);
  stream->put([to, from, delay]() mutable {
    std::this_thread::sleep_for(delay);
    to.copy_(from.expand_as(to));
  });
  if (!beside) stream->synchronize();
  return target;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  auto to = target;
  return copy(to, source, non_blocking);
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  auto to = target.resize_(source.sizes());
  return copy(to, source, false);
}

void copy_each(at::TensorList targets, at::TensorList sources, bool non_blocking) {
  for (size_t i = 0; i < targets.size(); i++) targets[i].copy_(sources[i], non_blocking);
}

at::Tensor& fill(at::Tensor& tensor, const at::Scalar& value) {
  if (!tensor.numel()) return tensor;
  auto to = seen_by_the_cpu(tensor);
  current_queue(tensor.device().index())->put([to, value]() mutable { to.fill_(value); });
  return tensor;
}

at::Tensor& zero(at::Tensor& tensor) { return fill(tensor, at::Scalar(0)); }

at::Scalar item(const at::Tensor& tensor) { return tensor.cpu().item(); }

void record_stream(at::Tensor& tensor, c10::Stream stream) {
  allocator.recordStream(tensor.storage().data_ptr(), stream);
}

void resize_storage(const at::Tensor& tensor, size_t size) {
  auto storage = tensor.storage();
  OnDevice on(storage.device());
  synchronize_current();
  auto fresh = allocator.allocate(size);
  if (size && storage.nbytes()) std::memcpy(fresh.get(), storage.data(), std::min(size, storage.nbytes()));
  storage.set_data_ptr_noswap(std::move(fresh));
  storage.set_nbytes(size);
}

const at::Tensor& resize(const at::Tensor& tensor, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = tensor.numel() ? (impl->storage_offset() + tensor.numel()) * tensor.element_size() : 0;
  if (tensor.storage().nbytes() < needed) resize_storage(tensor, needed);
  if (format) impl->empty_tensor_restride(*format);
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage) {
  int64_t length = storage.nbytes() / tensor.itemsize();
  return at::native::set_storage_cpu_(tensor, storage, 0, {length}, {1});
}

at::Tensor& set_nothing(at::Tensor& tensor) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), 0, allocator.allocate(0), &allocator, true);
  return at::native::set_storage_cpu_(tensor, storage, 0, {0}, {1});
}

}  // namespace

namespace c10 {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
REGISTER_ALLOCATOR(DeviceType::CUDA, &allocator);
}  // namespace c10

namespace at {
// torch looks for a class of this name.
struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex deviceCount() const override { return count_of_devices(); }
  int getNumGPUs() const override { return count_of_devices(); }
  void setCurrentDevice(DeviceIndex device) const override { ::current_device = device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override { return std::exchange(::current_device, device); }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? ::current_device : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* address) const override { return ::is_pinned(address); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  void deviceSynchronize(DeviceIndex device) const override { Guard().synchronizeDevice(device); }
  Generator getNewGenerator(DeviceIndex device) const override { return make_generator<DeviceGenerator>(device); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_foreach_copy_", copy_each);
  library.impl("fill_.Scalar", fill);
  library.impl("zero_", zero);
  library.impl("_local_scalar_dense", item);
  library.impl("record_stream", record_stream);
  library.impl("resize_", resize);
  library.impl("set_", set_nothing);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  library.impl("set_.source_Tensor", at::native::set_tensor_);
  library.impl("is_set_to", at::native::is_set_to);
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("view_as_real", at::native::view_as_real);
  library.impl("view_as_complex", at::native::view_as_complex);
  library.impl("unfold", at::native::unfold);
  library.impl("_reshape_alias", at::native::_reshape_alias);
}

// --- NCCL: gloo, for tensors of the device -----------------------------------------------------------------------------

namespace c10d {

using Tensors = std::vector<at::Tensor>;
using WorkOf = c10::intrusive_ptr<Work>;

struct Done : Work {
  explicit Done(Tensors result) : result_(std::move(result)) {
    auto type = c10::ListType::create(c10::TensorType::get());
    future_ = c10::make_intrusive<c10::ivalue::Future>(type, std::vector<c10::Device>{});
    future_->markCompleted(c10::IValue(result_));
    finish();
  }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  Tensors result() override { return result_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future_; }

 private:
  Tensors result_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

WorkOf done(Tensors result) { return c10::make_intrusive<Done>(std::move(result)); }

Tensors on_host(const Tensors& tensors) {
  Tensors copies;
  for (auto& one : tensors) {
    TORCH_CHECK(one.is_cuda(), "NCCL takes tensors of CUDA devices, not of ", one.device());
    copies.push_back(one.detach().cpu().contiguous());
  }
  return copies;
}

void to_device(const Tensors& targets, const Tensors& sources) {
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < targets.size(); i++) targets[i].detach().copy_(sources[i].view_as(targets[i]));
}

struct SimulatedNCCL : Backend {
  SimulatedNCCL(c10::intrusive_ptr<Backend> gloo, int rank, int size) : Backend(rank, size), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override { return "nccl"; }
  void setSequenceNumberForGroup() override {}
  uint64_t getSequenceNumberForGroup() override { return 0; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override {}
  WorkOf endCoalescing() override { return done({}); }

  WorkOf broadcast(Tensors& tensors, const BroadcastOptions& options) override {
    auto host = on_host(tensors);
    gloo_->broadcast(host, options)->wait();
    to_device(tensors, host);
    return done(tensors);
  }
  WorkOf allreduce(Tensors& tensors, const AllreduceOptions& options) override {
    auto host = on_host(tensors);
    for (auto& one : host) one = reduced(one, options.reduceOp);
    to_device(tensors, host);
    return done(tensors);
  }
  WorkOf allgather(std::vector<Tensors>& outputs, Tensors& inputs, const AllgatherOptions&) override {
    Tensors all;
    for (size_t i = 0; i < inputs.size(); i++) {
      to_device(outputs[i], gathered(inputs[i]));
      all.insert(all.end(), outputs[i].begin(), outputs[i].end());
    }
    return done(all);
  }
  WorkOf _allgather_base(at::Tensor& output, at::Tensor& input, const AllgatherOptions&) override {
    to_device({output.view({-1})}, {joined(gathered(input))});
    return done({output});
  }
  WorkOf allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs, const AllgatherOptions& options) override {
    for (size_t i = 0; i < inputs.size(); i++) _allgather_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  WorkOf _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const ReduceScatterOptions& options) override {
    auto all = reduced(on_host({input})[0].clone(), options.reduceOp);
    to_device({output.view({-1})}, {all.view({-1}).chunk(getSize())[getRank()]});
    return done({output});
  }
  WorkOf reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                         const ReduceScatterOptions& options) override {
    for (size_t i = 0; i < inputs.size(); i++) _reduce_scatter_base(outputs[i], inputs[i], options);
    return done(outputs);
  }
  WorkOf barrier(const BarrierOptions&) override {
    Guard().synchronizeDevice(current_device);
    gloo_->barrier(BarrierOptions())->wait();
    return done({});
  }

 private:
  static at::Tensor joined(const Tensors& parts) {
    Tensors flat;
    for (auto& one : parts) flat.push_back(one.reshape({-1}));
    return at::cat(flat);
  }
  Tensors gathered(const at::Tensor& input) {
    auto host = on_host({input});
    std::vector<Tensors> outputs(1);
    for (int rank = 0; rank < getSize(); rank++) outputs[0].push_back(at::empty_like(host[0]));
    gloo_->allgather(outputs, host, AllgatherOptions())->wait();
    return outputs[0];
  }
  at::Tensor reduced(at::Tensor tensor, const ReduceOp& op) {
    bool average = op == ReduceOp::AVG;
    AllreduceOptions options;
    options.reduceOp = average ? ReduceOp(ReduceOp::SUM) : op;
    Tensors one{tensor};
    gloo_->allreduce(one, options)->wait();
    if (!average) return one[0];
    return one[0].is_floating_point() ? one[0].div_(getSize()) : one[0].floor_divide_(getSize());
  }
  c10::intrusive_ptr<Backend> gloo_;
};

// DDP wants to know how long its steps take.
struct HostTimer : Timer {
  explicit HostTimer(c10::Device) {}
  void record(Timer::Event event) override { getTimeRef(event) = Clock::now().time_since_epoch().count(); }
  std::optional<int64_t> measureDifference(Timer::Event start, Timer::Event end) override {
    auto passed = getTimeRef(end) - getTimeRef(start);
    return passed < 0 ? std::nullopt : std::optional<int64_t>(passed);
  }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, HostTimer)

}  // namespace c10d

PYBIND11_MODULE(simulated_cuda_device, module) {
  module.def("count", &count_of_devices);
  module.def("get_device", [] { return current_device; });
  module.def("set_device", [](int device) { current_device = device; });
  module.def("pin", [](uintptr_t address, size_t size) {
    std::lock_guard lock(pinned_mutex);
    pinned[address] = size;
  });
  module.def("unpin", [](uintptr_t address) {
    std::lock_guard lock(pinned_mutex);
    return pinned.erase(address) == 1;
  });
  module.def("delay_copies", [](int64_t microseconds) { copy_delay = microseconds; });
  module.def("sleep", [](double seconds) {
    current_queue(current_device)->put([=] { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); });
  });
  module.def("allocated", [] { return allocated.load(); });
  module.def("resize_storage", &resize_storage);
  module.def("record_stream", [](at::Tensor tensor, int device, int64_t stream) {
    record_stream(tensor, Guard::stream(device, stream));
  });
  module.def("random_state", [](int device) {
    std::lock_guard lock(random_mutex);
    return random_state(device).clone();
  });
  module.def("set_random_state", [](const at::Tensor& state, int device) {
    std::lock_guard lock(random_mutex);
    random_state(device) = state.clone();
  });
  module.def("seed", [](uint64_t seed, int device) {
    std::lock_guard lock(random_mutex);
    random_state(device) = state_from(seed);
  });
  py::module_::import("torch._C._distributed_c10d");
  py::class_<c10d::SimulatedNCCL, c10d::Backend, c10::intrusive_ptr<c10d::SimulatedNCCL>>(module, "SimulatedNCCL")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>, int, int>());
}
