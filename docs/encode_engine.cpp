// Runs an encoder's engine without Python: aligned photos of one person to the identity's tokens.
//
//   encode_engine ENGINE PHOTOS SIZE TOKENS
//
// PHOTOS holds N photos of 3 x SIZE x SIZE bytes, channels first, RGB; TOKENS gets the float32 values of the code (L, C).
// Serves both runtimes: link tensorrt_rtx for an engine of tensorrt-rtx, nvinfer for one of tensorrt.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace {

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, char const* text) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << text << '\n';
  }
};

[[noreturn]] void fail(std::string const& sentence) {
  std::cerr << "encode_engine: " << sentence << '\n';
  std::exit(1);
}

void check(cudaError_t status) {
  if (status != cudaSuccess) fail(cudaGetErrorString(status));
}

std::vector<char> contents(char const* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(std::string("cannot read ") + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Memory of the GPU, freed with its owner.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes)); }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer const&) = delete;
  Buffer& operator=(Buffer const&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

bool within(nvinfer1::Dims const& low, nvinfer1::Dims const& size, nvinfer1::Dims const& high) {
  for (int axis = 0; axis < size.nbDims; ++axis)
    if (size.d[axis] < low.d[axis] || size.d[axis] > high.d[axis]) return false;
  return true;
}

// The first profile that takes these photos: they go from narrow to wide.
int profileFor(nvinfer1::ICudaEngine const& engine, nvinfer1::Dims const& images) {
  using Select = nvinfer1::OptProfileSelector;
  for (int index = 0; index < engine.getNbOptimizationProfiles(); ++index)
    if (within(engine.getProfileShape("images", index, Select::kMIN), images,
               engine.getProfileShape("images", index, Select::kMAX)))
      return index;
  fail("no profile of this engine takes so many photos");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) fail("usage: encode_engine ENGINE PHOTOS SIZE TOKENS");
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) fail("an engine needs an NVIDIA GPU and this machine has none");
  std::vector<char> const blob = contents(argv[1]), photos = contents(argv[2]);
  std::int64_t const side = std::atoi(argv[3]), bytes = 3 * side * side;
  if (side < 1 || photos.empty() || photos.size() % bytes != 0) fail("PHOTOS does not hold whole photos of this SIZE");
  std::int64_t const count = static_cast<std::int64_t>(photos.size()) / bytes;

  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> const runtime(nvinfer1::createInferRuntime(logger));
  if (!runtime) fail("the runtime cannot be made; its version and that of the headers must agree");
  std::unique_ptr<nvinfer1::ICudaEngine> const engine(runtime->deserializeCudaEngine(blob.data(), blob.size()));
  if (!engine) fail("the engine is damaged, or of another runtime version or GPU; build it again");
  std::unique_ptr<nvinfer1::IExecutionContext> const context(engine->createExecutionContext());
  if (!context) fail("there is too little GPU memory for this engine");

  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  nvinfer1::Dims const images{4, {count, 3, side, side}}, lengths{1, {1}};
  Buffer const imagesOnGpu(photos.size()), lengthsOnGpu(sizeof count);
  check(cudaMemcpyAsync(imagesOnGpu.data(), photos.data(), photos.size(), cudaMemcpyHostToDevice, stream));
  check(cudaMemcpyAsync(lengthsOnGpu.data(), &count, sizeof count, cudaMemcpyHostToDevice, stream));
  if (!context->setOptimizationProfileAsync(profileFor(*engine, images), stream) ||
      !context->setInputShape("images", images) || !context->setInputShape("lengths", lengths))
    fail("the engine does not take these sizes");
  nvinfer1::Dims const shape = context->getTensorShape("tokens");
  std::size_t size = 1;
  for (int axis = 0; axis < shape.nbDims; ++axis) size *= shape.d[axis];
  std::vector<float> tokens(size);
  Buffer const tokensOnGpu(size * sizeof(float));
  context->setTensorAddress("images", imagesOnGpu.data());
  context->setTensorAddress("lengths", lengthsOnGpu.data());
  context->setTensorAddress("tokens", tokensOnGpu.data());
  if (!context->enqueueV3(stream)) fail("the engine could not run");
  check(cudaMemcpyAsync(tokens.data(), tokensOnGpu.data(), size * sizeof(float), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  check(cudaStreamDestroy(stream));
  std::ofstream(argv[4], std::ios::binary).write(reinterpret_cast<char const*>(tokens.data()), size * sizeof(float));
  std::cout << count << " photos to " << shape.d[1] << " x " << shape.d[2] << " tokens\n";
}
