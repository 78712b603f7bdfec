// What the attention kernels of compiled programs share: they differ in their dtype and
// instructions.
//
// How data flows: a thread takes a block of queries of one head. Keys and values of that head are
// first packed as the kernel reads them, once for all of its queries. The scores of a block with
// every key are float32 and stay in the caches; the softmax of a row reads them twice and writes
// weights that are not divided by their sum; the product of these with the values is.
//
// Shapes: B images, H heads, Q queries, T tokens, K the width of a head.
// Sources: Vaswani et al. 1706.03762; the softmax less its maximum, Milakov and Gimelshein
// 1805.02867.

namespace {

constexpr int64_t kQueries = 32;  // of a block
constexpr float kLog2E = 1.44269504f;

// Transpose 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// The largest of a row of scores, in a memory whose length is a multiple of 16.
inline float largest_score(const float* scores, int64_t count) {
  const int64_t whole = count / kLanes * kLanes;
  __m512 a = _mm512_set1_ps(-std::numeric_limits<float>::infinity()), b = a;
  int64_t j = 0;
  for (; j + kLanes < whole; j += 2 * kLanes) {
    a = _mm512_max_ps(a, _mm512_load_ps(scores + j));
    b = _mm512_max_ps(b, _mm512_load_ps(scores + j + kLanes));
  }
  if (j < whole) a = _mm512_max_ps(a, _mm512_load_ps(scores + j));
  if (whole < count) {
    const __mmask16 rest = first_lanes(count - whole);
    b = _mm512_mask_max_ps(b, rest, b, _mm512_load_ps(scores + whole));
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(a, b));
}

at::Tensor last_dim_dense(const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); }

// A matrix for each image and head, whose rows lie apart.
template <typename Number>
struct Heads {
  const Number* data;
  int64_t image, head, row;  // strides

  explicit Heads(const at::Tensor& x)
      : data(static_cast<const Number*>(x.const_data_ptr())),
        image(x.stride(0)), head(x.stride(1)), row(x.stride(2)) {}

  const Number* at(int64_t b, int64_t h) const { return data + b * image + h * head; }
};

// Scaled queries (B, H, Q, K), keys and values (B, H, T, K) -> (B, Q, H K).
//
// A kernel is made for T and K, by each thread. It has pack(keys, row, values, row) and
// attend(queries, row, count, out, row), where a row is the distance of two rows in memory.
template <typename Kernel>
at::Tensor attend(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values) {
  using Number = typename Kernel::Number;
  for (const at::Tensor& x : {queries, keys, values})
    TORCH_CHECK(x.dim() == 4 && x.scalar_type() == Kernel::kDtype, "attention takes ",
                Kernel::kDtype, " of 4 dimensions, not ", x.scalar_type(), " of ", x.dim());
  const at::Tensor q = last_dim_dense(queries), k = last_dim_dense(keys), v = last_dim_dense(values);
  const int64_t images = q.size(0), heads = q.size(1), total = q.size(2), width = q.size(3);
  TORCH_CHECK(k.sizes() == v.sizes() && k.size(0) == images && k.size(1) == heads &&
                  k.size(3) == width && k.size(2) > 0 && width > 0,
              "queries ", q.sizes(), " do not fit keys ", k.sizes(), " and values ", v.sizes());
  const at::Tensor out = at::empty({images, total, heads * width}, q.options());
  const Heads<Number> all_q(q), all_k(k), all_v(v);
  auto* const results = static_cast<Number*>(out.mutable_data_ptr());
  const int64_t blocks = (total + kQueries - 1) / kQueries;
  split_among_threads(images * heads * blocks, [&](int64_t begin, int64_t end) {
    Kernel kernel(k.size(2), width);
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / blocks, start = task % blocks * kQueries;
      const int64_t b = pair / heads, h = pair % heads;
      if (packed != pair) {
        kernel.pack(all_k.at(b, h), all_k.row, all_v.at(b, h), all_v.row);
        packed = pair;
      }
      Number* const to = results + (b * total + start) * heads * width + h * width;
      kernel.attend(all_q.at(b, h) + start * all_q.row, all_q.row,
                    std::min(kQueries, total - start), to, heads * width);
    }
  });
  return out;
}

}  // namespace
