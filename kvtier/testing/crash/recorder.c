/* Records every call that changes files below a directory: the input of the simulated block device.
 *
 * Loaded with LD_PRELOAD. Nothing is recorded before kvtier_recorder_start(root, log). Each call is written to the log
 * twice: when it begins (with its data) and when it has ended (with its result), so that a replay knows which writes
 * were complete when a sync began. Files are named by inode, because descriptors are copied and paths are renamed.
 * What cannot be replayed (a shared writable mapping, stdio, copies inside the kernel) is recorded as UNTRACKED.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN = 1, WRITE, SIZE, ALLOCATE, SYNC, SYNC_ALL, RENAME, UNLINK, MKDIR, LINK, MARK, UNTRACKED };
enum phase { BEGIN = 0, END = 1 };

struct event {
    uint32_t kind, phase;
    uint64_t call, inode;
    int64_t offset, length, result;
    uint32_t flags, path_bytes, other_bytes, unused;
    uint64_t data_bytes;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_bytes;
static int log_fd = -1;
static uint64_t calls;

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void put_bytes(const void *bytes, size_t count) {
    const char *at = bytes;
    while (count) {
        ssize_t done = syscall(SYS_write, log_fd, at, count);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) abort(); /* a log with a hole would acquit the guilty */
        at += done;
        count -= (size_t)done;
    }
}

static uint64_t note(struct event event, const char *path, const char *other, const struct iovec *data, int pieces) {
    int saved = errno;
    event.path_bytes = path ? (uint32_t)strlen(path) : 0;
    event.other_bytes = other ? (uint32_t)strlen(other) : 0;
    for (int i = 0; i < pieces; i++) event.data_bytes += data[i].iov_len;
    pthread_mutex_lock(&lock);
    if (event.phase == BEGIN) event.call = ++calls;
    put_bytes(&event, sizeof event);
    if (path) put_bytes(path, event.path_bytes);
    if (other) put_bytes(other, event.other_bytes);
    for (int i = 0; i < pieces; i++) put_bytes(data[i].iov_base, data[i].iov_len);
    pthread_mutex_unlock(&lock);
    errno = saved;
    return event.call;
}

static void ended(enum kind kind, uint64_t call, uint64_t inode, int64_t result) {
    note((struct event){.kind = kind, .phase = END, .call = call, .inode = inode, .result = result}, NULL, NULL, NULL, 0);
}

static int below(const char *path) {
    return log_fd >= 0 && !strncmp(path, root, root_bytes) && (path[root_bytes] == '/' || !path[root_bytes]);
}

/* The path behind a descriptor, when it is below the root; deleted files keep their old name. */
static int tracked(int fd, char *path) {
    char link[64];
    if (log_fd < 0) return 0;
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    errno = saved;
    if (size <= 0) return 0;
    path[size] = 0;
    return below(path);
}

/* The path that a name means, relative to a directory, when it is below the root. */
static int resolved(int directory, const char *name, char *path) {
    char base[PATH_MAX];
    if (log_fd < 0 || !name) return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        if (directory == AT_FDCWD ? !getcwd(base, sizeof base) : !tracked(directory, base)) return 0;
        if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
    }
    return below(path);
}

static uint64_t inode_of(int fd) {
    struct stat found;
    int saved = errno;
    uint64_t inode = fstat(fd, &found) ? 0 : found.st_ino;
    errno = saved;
    return inode;
}

__attribute__((visibility("default"))) int kvtier_recorder_start(const char *directory, const char *log) {
    snprintf(root, sizeof root, "%s", directory);
    root_bytes = strlen(root);
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    return log_fd < 0 ? errno : 0;
}

__attribute__((visibility("default"))) void kvtier_recorder_mark(const void *bytes, size_t count) {
    struct iovec data = {(void *)bytes, count};
    if (log_fd >= 0) note((struct event){.kind = MARK}, NULL, NULL, &data, 1);
}

static void untracked(const char *what, const char *path) {
    note((struct event){.kind = UNTRACKED}, path, what, NULL, 0);
}

/* open */

static int opened(int fd, uint64_t call) {
    ended(OPEN, call, fd >= 0 ? inode_of(fd) : 0, fd);
    return fd;
}

static uint64_t opening(const char *path, int flags) {
    return note((struct event){.kind = OPEN, .flags = (uint32_t)flags}, path, NULL, NULL, 0);
}

#define OPEN_LIKE(name) \
    int name(const char *file, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        char path[PATH_MAX]; \
        if (!resolved(AT_FDCWD, file, path)) return real(file, flags, mode); \
        uint64_t call = opening(path, flags); \
        return opened(real(file, flags, mode), call); \
    }
#define OPENAT_LIKE(name) \
    int name(int directory, const char *file, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        char path[PATH_MAX]; \
        if (!resolved(directory, file, path)) return real(directory, file, flags, mode); \
        uint64_t call = opening(path, flags); \
        return opened(real(directory, file, flags, mode), call); \
    }
#define CREAT_LIKE(name) \
    int name(const char *file, mode_t mode) { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (!resolved(AT_FDCWD, file, path)) return real(file, mode); \
        uint64_t call = opening(path, O_WRONLY | O_CREAT | O_TRUNC); \
        return opened(real(file, mode), call); \
    }
#define FOPEN_LIKE(name) \
    FILE *name(const char *file, const char *mode) { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (strpbrk(mode, "wa+") && resolved(AT_FDCWD, file, path)) untracked(#name, path); \
        return real(file, mode); \
    }
OPEN_LIKE(open)
OPEN_LIKE(open64)
OPENAT_LIKE(openat)
OPENAT_LIKE(openat64)
CREAT_LIKE(creat)
CREAT_LIKE(creat64)
FOPEN_LIKE(fopen)
FOPEN_LIKE(fopen64)

/* write */

static uint64_t writing(int fd, const struct iovec *data, int pieces, off_t offset, int flags) {
    int saved = errno, status = fcntl(fd, F_GETFL);
    if (offset < 0) offset = lseek(fd, 0, SEEK_CUR);
    if (status & O_APPEND) {
        struct stat found;
        if (!fstat(fd, &found)) offset = found.st_size;
    }
    int synced = (status & (O_DSYNC | O_SYNC)) || (flags & (RWF_DSYNC | RWF_SYNC));
    errno = saved;
    struct event event = {.kind = WRITE, .inode = inode_of(fd), .offset = offset, .flags = synced ? 1 : 0};
    return note(event, NULL, NULL, data, pieces);
}

#define WRITE_LIKE(name, parameters, arguments, vector, pieces, offset, flags) \
    ssize_t name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (!tracked(fd, path)) return real arguments; \
        uint64_t call = writing(fd, vector, pieces, offset, flags); \
        ssize_t done = real arguments; \
        ended(WRITE, call, 0, done); \
        return done; \
    }
#define ONE (&(struct iovec){(void *)bytes, count})
WRITE_LIKE(write, (int fd, const void *bytes, size_t count), (fd, bytes, count), ONE, 1, -1, 0)
WRITE_LIKE(pwrite, (int fd, const void *bytes, size_t count, off_t at), (fd, bytes, count, at), ONE, 1, at, 0)
WRITE_LIKE(pwrite64, (int fd, const void *bytes, size_t count, off64_t at), (fd, bytes, count, at), ONE, 1, at, 0)
WRITE_LIKE(writev, (int fd, const struct iovec *v, int n), (fd, v, n), v, n, -1, 0)
WRITE_LIKE(pwritev, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at), v, n, at, 0)
WRITE_LIKE(pwritev64, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at), v, n, at, 0)
WRITE_LIKE(pwritev2, (int fd, const struct iovec *v, int n, off_t at, int f), (fd, v, n, at, f), v, n, at, f)
WRITE_LIKE(pwritev64v2, (int fd, const struct iovec *v, int n, off64_t at, int f), (fd, v, n, at, f), v, n, at, f)

/* Asynchronous writes: begun when they are submitted, ended when their completion is fetched. */

#define MOST_UNDER_WAY 4096

static struct under_way { uint64_t context, token, call; } under_way[MOST_UNDER_WAY];
static pthread_mutex_t under_way_lock = PTHREAD_MUTEX_INITIALIZER;

static void remember(uint64_t context, uint64_t token, uint64_t call) {
    pthread_mutex_lock(&under_way_lock);
    for (int i = 0; i < MOST_UNDER_WAY; i++) {
        if (under_way[i].call) continue;
        under_way[i] = (struct under_way){context, token, call};
        pthread_mutex_unlock(&under_way_lock);
        return;
    }
    abort(); /* more than anybody submits */
}

/* The call that was begun under a token, which is forgotten with it; 0 when it was none that is recorded. */
static uint64_t recall(uint64_t context, uint64_t token) {
    uint64_t call = 0;
    pthread_mutex_lock(&under_way_lock);
    for (int i = 0; i < MOST_UNDER_WAY && !call; i++) {
        if (!under_way[i].call || under_way[i].context != context || under_way[i].token != token) continue;
        call = under_way[i].call;
        under_way[i].call = 0;
    }
    pthread_mutex_unlock(&under_way_lock);
    return call;
}

static void submitting(uint64_t context, const struct iocb *request) {
    char path[PATH_MAX];
    struct iovec one = {(void *)(uintptr_t)request->aio_buf, request->aio_nbytes};
    int several = request->aio_lio_opcode == IOCB_CMD_PWRITEV;
    if (!several && request->aio_lio_opcode != IOCB_CMD_PWRITE) return;
    if (!tracked((int)request->aio_fildes, path)) return;
    const struct iovec *data = several ? (const struct iovec *)(uintptr_t)request->aio_buf : &one;
    int pieces = several ? (int)request->aio_nbytes : 1;
    remember(context, request->aio_data, writing((int)request->aio_fildes, data, pieces, request->aio_offset, 0));
}

static void fetched(uint64_t context, uint64_t token, int64_t result) {
    uint64_t call = recall(context, token);
    if (call) ended(WRITE, call, 0, result);
}

long syscall(long number, ...) {
    REAL(syscall);
    va_list rest;
    va_start(rest, number);
    long a = va_arg(rest, long), b = va_arg(rest, long), c = va_arg(rest, long);
    long d = va_arg(rest, long), e = va_arg(rest, long), f = va_arg(rest, long);
    va_end(rest);
    if (log_fd >= 0 && number == SYS_io_submit) {
        struct iocb **requests = (struct iocb **)c;
        for (long i = 0; i < b; i++) submitting((uint64_t)a, requests[i]);
        long done = real(number, a, b, c);
        for (long i = done < 0 ? 0 : done; i < b; i++) fetched((uint64_t)a, requests[i]->aio_data, -1);
        return done;
    }
    long done = real(number, a, b, c, d, e, f);
    if (log_fd >= 0 && number == SYS_io_getevents)
        for (long i = 0; i < done; i++) {
            struct io_event *event = (struct io_event *)d + i;
            fetched((uint64_t)a, event->data, event->res);
        }
    return done;
}

/* size, space, sync */

#define FILE_CALL(name, parameters, arguments, ...) \
    int name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (!tracked(fd, path)) return real arguments; \
        struct event event = {.inode = inode_of(fd), __VA_ARGS__}; \
        uint64_t call = note(event, path, NULL, NULL, 0); \
        int done = real arguments; \
        ended(event.kind, call, event.inode, done); \
        return done; \
    }
FILE_CALL(ftruncate, (int fd, off_t size), (fd, size), .kind = SIZE, .length = size)
FILE_CALL(ftruncate64, (int fd, off64_t size), (fd, size), .kind = SIZE, .length = size)
FILE_CALL(fallocate, (int fd, int mode, off_t at, off_t size), (fd, mode, at, size), .kind = ALLOCATE, .offset = at,
          .length = size, .flags = (uint32_t)mode)
FILE_CALL(fallocate64, (int fd, int mode, off64_t at, off64_t size), (fd, mode, at, size), .kind = ALLOCATE,
          .offset = at, .length = size, .flags = (uint32_t)mode)
FILE_CALL(posix_fallocate, (int fd, off_t at, off_t size), (fd, at, size), .kind = ALLOCATE, .offset = at,
          .length = size)
FILE_CALL(posix_fallocate64, (int fd, off64_t at, off64_t size), (fd, at, size), .kind = ALLOCATE, .offset = at,
          .length = size)
FILE_CALL(fsync, (int fd), (fd), .kind = SYNC)
FILE_CALL(fdatasync, (int fd), (fd), .kind = SYNC, .flags = 1)
FILE_CALL(syncfs, (int fd), (fd), .kind = SYNC_ALL)

/* names */

#define NAME_CALL(name, parameters, arguments, directory, file, ...) \
    int name parameters { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (!resolved(directory, file, path)) return real arguments; \
        struct event event = {__VA_ARGS__}; \
        uint64_t call = note(event, path, NULL, NULL, 0); \
        int done = real arguments; \
        ended(event.kind, call, 0, done); \
        return done; \
    }
#define TWO_NAMES_CALL(name, parameters, arguments, directory, file, other_directory, other_file, ...) \
    int name parameters { \
        REAL(name); \
        char path[PATH_MAX], other[PATH_MAX]; \
        int one = resolved(directory, file, path), two = resolved(other_directory, other_file, other); \
        if (!one && !two) return real arguments; \
        struct event event = {__VA_ARGS__}; \
        uint64_t call = note(event, one ? path : file, two ? other : other_file, NULL, 0); \
        int done = real arguments; \
        ended(event.kind, call, 0, done); \
        return done; \
    }
NAME_CALL(unlink, (const char *file), (file), AT_FDCWD, file, .kind = UNLINK)
NAME_CALL(unlinkat, (int at, const char *file, int flags), (at, file, flags), at, file, .kind = UNLINK)
NAME_CALL(remove, (const char *file), (file), AT_FDCWD, file, .kind = UNLINK)
NAME_CALL(rmdir, (const char *file), (file), AT_FDCWD, file, .kind = UNLINK)
NAME_CALL(mkdir, (const char *file, mode_t mode), (file, mode), AT_FDCWD, file, .kind = MKDIR)
NAME_CALL(mkdirat, (int at, const char *file, mode_t mode), (at, file, mode), at, file, .kind = MKDIR)
NAME_CALL(truncate, (const char *file, off_t size), (file, size), AT_FDCWD, file, .kind = SIZE, .length = size)
NAME_CALL(truncate64, (const char *file, off64_t size), (file, size), AT_FDCWD, file, .kind = SIZE, .length = size)
TWO_NAMES_CALL(rename, (const char *file, const char *to), (file, to), AT_FDCWD, file, AT_FDCWD, to, .kind = RENAME)
TWO_NAMES_CALL(renameat, (int a, const char *file, int b, const char *to), (a, file, b, to), a, file, b, to,
               .kind = RENAME)
TWO_NAMES_CALL(renameat2, (int a, const char *file, int b, const char *to, unsigned int flags), (a, file, b, to, flags),
               a, file, b, to, .kind = RENAME, .flags = flags)
TWO_NAMES_CALL(link, (const char *file, const char *to), (file, to), AT_FDCWD, file, AT_FDCWD, to, .kind = LINK)
TWO_NAMES_CALL(linkat, (int a, const char *file, int b, const char *to, int flags), (a, file, b, to, flags), a, file, b,
               to, .kind = LINK)

void sync(void) {
    REAL(sync);
    uint64_t call = log_fd < 0 ? 0 : note((struct event){.kind = SYNC_ALL}, NULL, NULL, NULL, 0);
    real();
    if (call) ended(SYNC_ALL, call, 0, 0);
}

/* what a replay could not follow */

#define MMAP_LIKE(name, offset_type) \
    void *name(void *where, size_t size, int protection, int flags, int fd, offset_type at) { \
        REAL(name); \
        char path[PATH_MAX]; \
        if (fd >= 0 && (flags & MAP_SHARED) && (protection & PROT_WRITE) && tracked(fd, path)) untracked("mmap", path); \
        return real(where, size, protection, flags, fd, at); \
    }
MMAP_LIKE(mmap, off_t)
MMAP_LIKE(mmap64, off64_t)

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned int flags) {
    REAL(copy_file_range);
    char path[PATH_MAX];
    if (tracked(to, path)) untracked("copy_file_range", path);
    return real(from, from_at, to, to_at, size, flags);
}

ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    REAL(sendfile);
    char path[PATH_MAX];
    if (tracked(to, path)) untracked("sendfile", path);
    return real(to, from, at, size);
}
