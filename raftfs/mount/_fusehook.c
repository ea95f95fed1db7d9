/* What pyfuse3 and libfuse 3.14 cannot be asked for, added by interposition.
 *
 * Imported with RTLD_GLOBAL before pyfuse3, so that pyfuse3's references to fuse_session_new() and
 * fuse_session_mount() bind to the functions below. They call the real ones and, on the way,
 *
 *  - set INIT flags that libfuse 3.14 drops (PARALLEL_DIROPS: lookups in one directory run at the
 *    same time; HANDLE_KILLPRIV_V2: no getxattr before each write). The flags go into the INIT
 *    reply as it passes through the public fuse_session_custom_io();
 *  - wish for capabilities that pyfuse3 does not (DONT_MASK: the umask reaches us unapplied) and
 *    set max_background and max_readahead;
 *  - make the device non-blocking and turn EAGAIN into EINTR, the one errno that pyfuse3 tolerates:
 *    a request whose caller was killed may vanish between poll() and read().
 *
 * Uses public interfaces of libfuse only. Handlers that pyfuse3 lacks (locks, fallocate, lseek,
 * copy_file_range) have their place in adopt_handlers().
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#define FUSE_USE_VERSION 312
#include <fuse_lowlevel.h>

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static struct {
    unsigned want;                 /* FUSE_CAP_* to wish for when the kernel offers them */
    unsigned max_background;       /* 0: the kernel's default */
    unsigned max_readahead;        /* 0: the kernel's default; the kernel takes the smaller one */
    unsigned long long init_flags; /* raw INIT flags (FUSE_*), upper half into flags2 */
} config;

static struct {
    int sessions;      /* fuse_session_new() calls that came through here */
    int init_seen;     /* the kernel's INIT was handled */
    int reply_patched; /* the INIT reply carried our flags */
    unsigned capable;
    unsigned wanted;
    unsigned long long kernel_flags; /* flags that the kernel itself offered */
} seen;

static void (*next_init)(void *, struct fuse_conn_info *);

static void on_init(void *userdata, struct fuse_conn_info *conn)
{
    if (next_init)
        next_init(userdata, conn);
    conn->want |= config.want & conn->capable;
    if (config.max_background)
        conn->max_background = config.max_background;
    if (config.max_readahead)
        conn->max_readahead = config.max_readahead;
    seen.init_seen = 1;
    seen.capable = conn->capable;
    seen.wanted = conn->want;
}

static void adopt_handlers(struct fuse_lowlevel_ops *ops)
{
    next_init = ops->init;
    ops->init = on_init;
}

/* --- the device ------------------------------------------------------------------------------- */

static ssize_t device_read(int fd, void *buf, size_t size, void *userdata)
{
    ssize_t got = read(fd, buf, size);
    (void)userdata;

    if (got < 0 && errno == EAGAIN) {
        errno = EINTR;
        return got;
    }
    if (got >= (ssize_t)(sizeof(struct fuse_in_header) + sizeof(struct fuse_init_in))) {
        const struct fuse_in_header *head = buf;
        const struct fuse_init_in *init = (const void *)(head + 1);
        if (head->opcode == FUSE_INIT)
            seen.kernel_flags = init->flags | ((unsigned long long)init->flags2 << 32);
    }
    return got;
}

static ssize_t device_writev(int fd, struct iovec *iov, int count, void *userdata)
{
    (void)userdata;
    /* The first reply of this size after INIT was handled is the INIT reply itself. */
    if (seen.init_seen && !seen.reply_patched && count == 2 &&
        iov[1].iov_len == sizeof(struct fuse_init_out)) {
        struct fuse_init_out *out = iov[1].iov_base;
        unsigned long long flags = config.init_flags & seen.kernel_flags;
        out->flags |= (uint32_t)flags;
        out->flags2 |= (uint32_t)(flags >> 32);
        seen.reply_patched = 1;
    }
    return writev(fd, iov, count);
}

static const struct fuse_custom_io device_io = {
    .read = device_read,
    .writev = device_writev,
};

/* --- interposed functions of libfuse ---------------------------------------------------------- */

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *ops,
                                      size_t ops_size, void *userdata)
{
    struct fuse_session *(*real)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                 void *) = dlsym(RTLD_NEXT, "fuse_session_new");
    struct fuse_lowlevel_ops ours;

    if (!real)
        return NULL;
    memset(&ours, 0, sizeof ours);
    memcpy(&ours, ops, ops_size < sizeof ours ? ops_size : sizeof ours);
    memset(&seen, 0, sizeof seen);
    adopt_handlers(&ours);
    seen.sessions = 1;
    return real(args, &ours, sizeof ours, userdata);
}

int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
    int (*real)(struct fuse_session *, const char *) = dlsym(RTLD_NEXT, "fuse_session_mount");
    int result, fd;

    if (!real)
        return -1;
    result = real(session, mountpoint);
    if (result != 0)
        return result;
    fd = fuse_session_fd(session);
    if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0)
        return -1;
    return fuse_session_custom_io(session, &device_io, fd) == 0 ? 0 : -1;
}

/* --- Python ----------------------------------------------------------------------------------- */

static PyObject *configure(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"want", "max_background", "max_readahead", "init_flags", NULL};
    (void)self;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$IIIK", names, &config.want,
                                     &config.max_background, &config.max_readahead,
                                     &config.init_flags))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *status(PyObject *self, PyObject *args)
{
    (void)self;
    (void)args;
    return Py_BuildValue("{s:i,s:i,s:i,s:I,s:I,s:K}", "sessions", seen.sessions, "init_seen",
                         seen.init_seen, "reply_patched", seen.reply_patched, "capable",
                         seen.capable, "wanted", seen.wanted, "kernel_flags", seen.kernel_flags);
}

static PyMethodDef methods[] = {
    {"configure", (PyCFunction)(void (*)(void))configure, METH_VARARGS | METH_KEYWORDS,
     "configure(*, want=0, max_background=0, max_readahead=0, init_flags=0): for the next mount."},
    {"status", status, METH_NOARGS, "What was hooked and negotiated so far, as a dict of ints."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_fusehook", "Extends libfuse under pyfuse3; import it first.", -1,
    methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__fusehook(void)
{
    return PyModule_Create(&module);
}
