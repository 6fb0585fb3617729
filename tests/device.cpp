// Two devices that look like GPUs to llama.cpp and compute on the CPU: buffers of their own that the host must not touch, ops of the host taken from 32
// tokens on. So what is placed where, and what has to be copied for it, is tested without a GPU. register_devices() adds them to the process.
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static constexpr int    N         = 2;
static constexpr size_t ALIGNMENT = 128, MEMORY = (size_t) 8 << 30;
static constexpr int    MIN_BATCH = 32; // tokens

struct device {
    ggml_backend_device      dev;
    ggml_backend_buffer_type buft;
    std::string              name;
};
static device devices[N];

static std::atomic<long> n_set, n_together; // bytes written to tensors of the devices, copies that were under way together with others
extern "C" long bytes_set() { return n_set; }
extern "C" long copied_together() { return n_together; }

static device & of(ggml_backend_dev_t dev) { return *(device *) dev->context; }

//
// buffers
//

static void   free_buffer(ggml_backend_buffer_t b) { free(b->context); }
static void * get_base   (ggml_backend_buffer_t b) { return b->context; }
static void   clear      (ggml_backend_buffer_t b, uint8_t value) { memset(b->context, value, b->size); }
static void   memset_tensor(ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t offset, size_t size) { memset((char *) t->data + offset, value, size); }
static void   set_tensor(ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
    n_set += size;
}
static void   get_tensor(ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t offset, size_t size) { memcpy(data, (const char *) t->data + offset, size); }

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    void * base = aligned_alloc(ALIGNMENT, (size + ALIGNMENT)/ALIGNMENT*ALIGNMENT);
    if (!base) {
        return nullptr;
    }
    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = free_buffer;
    iface.get_base      = get_base;
    iface.memset_tensor = memset_tensor;
    iface.set_tensor    = set_tensor;
    iface.get_tensor    = get_tensor;
    iface.clear         = clear;
    memset(base, 0xff, size); // NaN: what is not written must not count
    return ggml_backend_buffer_init(buft, iface, base, size);
}

// memory of the host that both devices read by themselves, as pinned memory is
static ggml_backend_buffer_type host_type;

static ggml_backend_buffer_t alloc_host(ggml_backend_buffer_type_t buft, size_t size) {
    void * base = aligned_alloc(ALIGNMENT, (size + ALIGNMENT)/ALIGNMENT*ALIGNMENT);
    if (!base) {
        return nullptr;
    }
    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(base, size);
    buffer->buft = buft;
    buffer->iface.free_buffer = free_buffer;
    return buffer;
}

//
// backend
//

struct copy {
    void *       to;
    const void * from;
    size_t       size;
};

struct other_backend {
    ggml_backend_t    cpu;
    std::vector<copy> copies; // under way: done when they are waited for, as late as may be
};

static other_backend & of(ggml_backend_t b) { return *(other_backend *) b->context; }

static ggml_guid_t guid() {
    static ggml_guid id = { 0x5e, 0x71, 0x6b, 0x76, 0x2d, 0x65, 0x64, 0x67, 0x65, 0x2d, 0x64, 0x65, 0x76, 0x69, 0x63, 0x65 };
    return &id;
}

static ggml_backend_t init_backend(ggml_backend_dev_t dev, const char *) {
    auto * backend = new ggml_backend {};
    backend->guid    = guid();
    backend->device  = dev;
    backend->context = new other_backend { ggml_backend_cpu_init(), {} };
    backend->iface.get_name = [](ggml_backend_t b) { return of(b->device).name.c_str(); };
    backend->iface.free     = [](ggml_backend_t b) {
        ggml_backend_free(of(b).cpu);
        delete &of(b);
        delete b;
    };
    backend->iface.set_tensor_async = [](ggml_backend_t b, ggml_tensor * t, const void * data, size_t offset, size_t size) {
        of(b).copies.push_back({ (char *) t->data + offset, data, size });
    };
    backend->iface.synchronize = [](ggml_backend_t b) { // all else is done at once
        auto & copies = of(b).copies;
        for (const copy & c : copies) {
            memcpy(c.to, c.from, c.size);
            n_set += c.size;
        }
        n_together += copies.size() > 1 ? copies.size() : 0;
        copies.clear();
    };
    backend->iface.event_record = [](ggml_backend_t, ggml_backend_event_t) {};
    backend->iface.event_wait   = [](ggml_backend_t, ggml_backend_event_t) {};
    backend->iface.graph_compute = [](ggml_backend_t b, ggml_cgraph * graph) {
        if (!of(b).copies.empty()) { // whose memory may be written again from here on
            GGML_ABORT("%s: %zu copies are not waited for", of(b->device).name.c_str(), of(b).copies.size());
        }
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) { // nothing may lie where this device does not reach
            const ggml_tensor * node = ggml_graph_node(graph, i);
            const bool view = node->op == GGML_OP_NONE || node->op == GGML_OP_RESHAPE || node->op == GGML_OP_VIEW || node->op == GGML_OP_PERMUTE || node->op == GGML_OP_TRANSPOSE;
            for (int j = -1; j < GGML_MAX_SRC && !view; ++j) {
                const ggml_tensor * t = j < 0 ? node : node->src[j];
                if (t && t->buffer && ggml_nelements(t) > 0 && ggml_backend_buffer_get_type(t->buffer) != &of(b->device).buft) {
                    GGML_ABORT("%s: %s (%s) is in %s", of(b->device).name.c_str(), t->name, ggml_op_desc(node), ggml_backend_buffer_name(t->buffer));
                }
            }
        }
        return ggml_backend_graph_compute(of(b).cpu, graph);
    };
    return backend;
}

//
// devices
//

static int64_t batch_size(const ggml_tensor * op) { // as ggml-cuda counts it
    switch (op->op) {
        case GGML_OP_GET_ROWS: return 0;
        case GGML_OP_MUL_MAT:  return op->ne[1];
        case GGML_OP_MUL_MAT_ID:
        case GGML_OP_ROPE:
        case GGML_OP_ROPE_BACK:
        case GGML_OP_SEQKV_ATTN: return op->ne[2];
        default: return ggml_nrows(op);
    }
}

static ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

static void make_device(int i, ggml_backend_reg_t reg) {
    device & d = devices[i];
    d.name = "OTHER" + std::to_string(i);

    d.buft.device  = &d.dev;
    d.buft.context = &d;
    d.buft.iface.get_name      = [](ggml_backend_buffer_type_t b) { return ((device *) b->context)->name.c_str(); };
    d.buft.iface.alloc_buffer  = alloc_buffer;
    d.buft.iface.get_alignment = [](ggml_backend_buffer_type_t) { return ALIGNMENT; };

    d.dev.reg     = reg;
    d.dev.context = &d;
    auto & f = d.dev.iface;
    f.get_name        = [](ggml_backend_dev_t dev) { return of(dev).name.c_str(); };
    f.get_description = [](ggml_backend_dev_t) { return "the CPU as another device"; };
    f.get_memory      = [](ggml_backend_dev_t, size_t * free, size_t * total) { *free = *total = MEMORY; };
    f.get_type        = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    f.get_props       = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        *props = {};
        props->name        = dev->iface.get_name(dev);
        props->description = dev->iface.get_description(dev);
        props->type        = dev->iface.get_type(dev);
        dev->iface.get_memory(dev, &props->memory_free, &props->memory_total);
        props->caps.async = props->caps.events = true; // so that several devices work on ubatches in turns, with copies of inputs for each
    };
    f.init_backend    = init_backend;
    f.get_buffer_type = [](ggml_backend_dev_t dev) { return &of(dev).buft; };
    f.get_host_buffer_type = [](ggml_backend_dev_t) { return &host_type; };
    f.supports_op     = [](ggml_backend_dev_t, const ggml_tensor * op) { return ggml_backend_dev_supports_op(cpu(), op); };
    f.supports_buft   = [](ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) { return buft == &of(dev).buft; };
    f.event_new       = [](ggml_backend_dev_t dev) { return new ggml_backend_event { dev, nullptr }; };
    f.event_free      = [](ggml_backend_dev_t, ggml_backend_event_t e) { delete e; };
    f.event_synchronize = [](ggml_backend_dev_t, ggml_backend_event_t) {};
    f.offload_op      = [](ggml_backend_dev_t, const ggml_tensor * op) { return batch_size(op) >= MIN_BATCH; };
}

extern "C" void register_devices() {
    static ggml_backend_reg reg = {};
    reg.api_version = GGML_BACKEND_API_VERSION;
    reg.iface.get_name         = [](ggml_backend_reg_t) { return "OTHER"; };
    reg.iface.get_device_count = [](ggml_backend_reg_t) { return (size_t) N; };
    reg.iface.get_device       = [](ggml_backend_reg_t, size_t i) { return &devices[i].dev; };
    reg.iface.get_proc_address = [](ggml_backend_reg_t, const char *) { return (void *) nullptr; };
    for (int i = 0; i < N; ++i) {
        make_device(i, &reg);
    }
    host_type.device = &devices[0].dev;
    host_type.iface.get_name      = [](ggml_backend_buffer_type_t) { return "OTHER_Host"; };
    host_type.iface.alloc_buffer  = alloc_host;
    host_type.iface.get_alignment = [](ggml_backend_buffer_type_t) { return ALIGNMENT; };
    host_type.iface.is_host       = [](ggml_backend_buffer_type_t) { return true; };
    ggml_backend_register(&reg);
}
