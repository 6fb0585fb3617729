// What Python sees of native/seqkv.h. Read by tools/build_codec.py; every line must also hold without "..." (dlopen).

#define SEQKV_OK 0
#define SEQKV_EBITS -1
#define SEQKV_ELENGTH -2
#define SEQKV_ESHAPE -3
#define SEQKV_EDATA -4

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


typedef struct {
    int32_t n_head;
    int32_t dk, dv;
    int32_t n_rot, neox;
    const int16_t * rope;
    const int16_t * k_encode;
    const int16_t * k_decode;
    const uint8_t * k_shift;
    const uint8_t * v_gain;
} seqkv_layer;
typedef struct {
    const int8_t   * weight;
    const uint16_t * step;
    const uint8_t  * spread;
    const uint8_t  * copy;
    const int8_t   * copy_error;
    const int8_t   * copy_spread;
    const int32_t  * gain;
} seqkv_predictor;
typedef struct {
    int32_t n_past, n;
    int32_t k_bits, v_bits;
    int32_t prev_k_bits, prev_v_bits;
    const uint8_t * offset;
    const int32_t * source;
    const uint8_t * match;
    const uint8_t * k_past, * v_past;
    const uint8_t * prev_k, * prev_v;
} seqkv_frame;
int64_t seqkv_delta_transform(const float * enc, int n, int n_rot, int neox, int16_t * k_encode, int16_t * k_decode,
                                        uint8_t * k_shift, double * work);
int64_t seqkv_delta_inputs(const seqkv_layer * layer, int k_bits, int v_bits, const uint8_t * offset, int64_t n_rows,
                                     const uint8_t * k, const uint8_t * v, int16_t * x, int16_t * z);
int64_t seqkv_delta_work(const seqkv_layer * layer, const seqkv_layer * prev);
int64_t seqkv_delta_bound(const seqkv_layer * layer, int n);
int64_t seqkv_delta_encode(const seqkv_layer * layer, const seqkv_layer * prev, const seqkv_predictor * pk,
                                     const seqkv_predictor * pv, const seqkv_frame * frame, const uint8_t * k, const uint8_t * v,
                                     uint8_t * dst, int64_t n_dst, void * work, int64_t n_work);
int64_t seqkv_delta_decode(const seqkv_layer * layer, const seqkv_layer * prev, const seqkv_predictor * pk,
                                     const seqkv_predictor * pv, const seqkv_frame * frame, uint8_t * k, uint8_t * v,
                                     const uint8_t * src, int64_t n_src, void * work, int64_t n_work);
int64_t seqkv_weights_bound(int64_t n);
int64_t seqkv_weights_encode(const int8_t * w, int64_t n, uint8_t * dst, int64_t n_dst, uint32_t * work);
int64_t seqkv_weights_decode(const uint8_t * src, int64_t n_src, int8_t * w, int64_t n);
#define SEQKV_TOKENS_MAX 134217728
int64_t seqkv_tokens_work(int64_t n, int n_bits);
int64_t seqkv_tokens_bound(int64_t n, int n_bits);
int64_t seqkv_tokens_encode(const uint32_t * tokens, int64_t n, int n_bits, void * work, int64_t n_work, void * dst, int64_t n_dst);
int64_t seqkv_tokens_decode(const void * src, int64_t n_src, int n_bits, void * work, int64_t n_work, uint32_t * tokens, int64_t n);
