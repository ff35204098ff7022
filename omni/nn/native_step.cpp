// One text token of one row against the KV cache, on the CPU: the arithmetic of decode_step.py in loops that read every weight
// once. Compiled at run time by native_step.py.
//
// Weights are float32 or bfloat16 (widened to float32 as they are read); activations, cache and sums are float32.
//
// Legend: W width, H query heads, G key heads, D head width, F width of the MLP, M capacity of the cache in positions.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Sizes {  // the order of native_step.py
  int64_t width, depth, num_heads, num_kv_heads, head_dim, hidden;
};

template <typename T>
struct Layer {  // the order of native_step.py; norms are float32
  const float *attention_norm, *q_norm, *k_norm, *mlp_norm;
  const T *qkv, *out, *gate_up, *down;
};

inline float widen(float x) { return x; }

inline float widen(uint16_t x) {  // bfloat16 is the upper half of a float32
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
float dot(const T* w, const float* x, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += widen(w[i]) * x[i];
  return sum;
}

// y = weight x, or y += weight x; weight (rows, n). Row after row: one stream of memory is what the prefetcher likes
// best (four rows at a time took twice as long).
template <typename T>
void product(const T* weight, const float* x, float* y, int64_t rows, int64_t n, bool add, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t r = 0; r < rows; r++) y[r] = (add ? y[r] : 0) + dot(weight + r * n, x, n);
}

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
void rms_norm(const float* x, const float* weight, float* y, int64_t n, float eps) {
  const float scale = 1 / std::sqrt(dot(x, x, n) / n + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// x cos + roll(x, D/2) sin, where sin carries the sign (TokenStep._rotary).
void rotate(float* x, const float* cos, const float* sin, int64_t D) {
  for (int64_t i = 0, j = D / 2; j < D; i++, j++) {
    const float a = x[i], b = x[j];
    x[i] = a * cos[i] + b * sin[i];
    x[j] = b * cos[j] + a * sin[j];
  }
}

// o (D) = softmax(q keys^T / sqrt(D)) values, over `count` positions; scores has room for them.
void attend(const float* q, const float* keys, const float* values, float* scores, float* o, int64_t count, int64_t D) {
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  float largest = -INFINITY, total = 0;
  for (int64_t p = 0; p < count; p++) {
    scores[p] = dot(keys + p * D, q, D) * scale;
    largest = std::fmax(largest, scores[p]);
  }
  for (int64_t p = 0; p < count; p++) total += scores[p] = std::exp(scores[p] - largest);
  for (int64_t i = 0; i < D; i++) o[i] = 0;
  for (int64_t p = 0; p < count; p++) {
    const float share = scores[p] / total;
    for (int64_t i = 0; i < D; i++) o[i] += share * values[p * D + i];
  }
}

// h (W) in and out. keys, values: (depth, 1, G, M, D), written at position `at`, read up to it.
template <typename T>
void step(const Sizes& c, const Layer<T>* layers, const float* norm, float* h, const float* cos, const float* sin,
          float* keys, float* values, int64_t capacity, int64_t at, float eps, int threads) {
  const int64_t W = c.width, H = c.num_heads, G = c.num_kv_heads, D = c.head_dim, F = c.hidden;
  std::vector<float> x(W), qkv((H + 2 * G) * D), o(H * D), mlp(2 * F), scores(H * (at + 1));
  for (int64_t layer = 0; layer < c.depth; layer++) {
    const Layer<T>& w = layers[layer];
    rms_norm(h, w.attention_norm, x.data(), W, eps);
    product(w.qkv, x.data(), qkv.data(), (H + 2 * G) * D, W, false, threads);
    for (int64_t head = 0; head < H + G; head++) {
      float* one = qkv.data() + head * D;
      rms_norm(one, head < H ? w.q_norm : w.k_norm, one, D, eps);
      rotate(one, cos, sin, D);
    }
    float *k = keys + layer * G * capacity * D, *v = values + layer * G * capacity * D;
    for (int64_t g = 0; g < G; g++) {
      std::memcpy(k + (g * capacity + at) * D, qkv.data() + (H + g) * D, D * sizeof(float));
      std::memcpy(v + (g * capacity + at) * D, qkv.data() + (H + G + g) * D, D * sizeof(float));
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t head = 0; head < H; head++) {
      const int64_t start = head / (H / G) * capacity * D;
      attend(qkv.data() + head * D, k + start, v + start, &scores[head * (at + 1)], &o[head * D], at + 1, D);
    }
    product(w.out, o.data(), h, W, H * D, true, threads);
    rms_norm(h, w.mlp_norm, x.data(), W, eps);
    product(w.gate_up, x.data(), mlp.data(), 2 * F, W, false, threads);
    for (int64_t i = 0; i < F; i++) mlp[i] = mlp[i] / (1 + std::exp(-mlp[i])) * mlp[F + i];  // SiLU(gate) up
    product(w.down, mlp.data(), h, W, F, true, threads);
  }
  rms_norm(h, norm, h, W, eps);
}

}  // namespace

// What native_step.py calls: each once for float32 weights, once for bfloat16.
#define EXPORT(SUFFIX, T)                                                                                             \
  extern "C" void step_##SUFFIX(const void* sizes, const void* layers, const float* norm, float* h, const float* cos, \
                                const float* sin, float* keys, float* values, int64_t capacity, int64_t at,           \
                                float eps, int threads) {                                                             \
    step<T>(*static_cast<const Sizes*>(sizes), static_cast<const Layer<T>*>(layers), norm, h, cos, sin, keys, values, \
            capacity, at, eps, threads);                                                                              \
  }                                                                                                                   \
  extern "C" void read_##SUFFIX(const void* weight, const float* x, float* y, int64_t rows, int64_t n, int threads) { \
    product(static_cast<const T*>(weight), x, y, rows, n, false, threads);                                            \
  }

EXPORT(float32, float)
EXPORT(bfloat16, uint16_t)
