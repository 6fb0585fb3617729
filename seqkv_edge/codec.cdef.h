// What Python sees of native/seqkv.h. Read by tools/build_codec.py; every line must also hold without "..." (dlopen).

#define SEQKV_OK 0
#define SEQKV_EBITS -1
#define SEQKV_ELENGTH -2

const char * seqkv_strerror(int64_t status);
int64_t seqkv_bound(int bits, int graded, int64_t n);
int64_t seqkv_quantize(int bits, int graded, const float * x, int64_t n, void * dst, int64_t n_dst);
int64_t seqkv_dequantize(int bits, int graded, const void * src, int64_t n_src, float * y, int64_t n);
int64_t seqkv_unpack(int bits, int graded, const void * src, int64_t n_src, uint8_t * codes, uint8_t * gains, int64_t n);
void seqkv_fwht(float * x, int n);
void seqkv_rotate(float * x, const float * cs, int n_rot, int neox, int inverse);
void seqkv_encode_key(int bits, int graded, const float * k_frame, int head_dim, const float * enc, const float * pred, void * dst);
void seqkv_decode_key(int bits, int graded, const void * src, int head_dim, const float * dec, const float * pred, float * k_frame);
void seqkv_encode_value(int bits, const float * v, int head_dim, const float * mean, const float * scale, void * dst);
void seqkv_decode_value(int bits, const void * src, int head_dim, const float * mean, const float * scale, float * v);
void seqkv_attention(const float * q, const float * k, const float * v, const float * mask, int64_t n, int dk, int dv,
                     float scale, float softcap, const float * sink, float * out);

#define SEQKV_TOKENS_MAX 134217728
int64_t seqkv_tokens_work(int64_t n, int n_bits);
int64_t seqkv_tokens_bound(int64_t n, int n_bits);
int64_t seqkv_tokens_encode(const uint32_t * tokens, int64_t n, int n_bits, void * work, int64_t n_work, void * dst, int64_t n_dst);
int64_t seqkv_tokens_decode(const void * src, int64_t n_src, int n_bits, void * work, int64_t n_work, uint32_t * tokens, int64_t n);
