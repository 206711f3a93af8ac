/* A failing disk, for LD_PRELOAD: the n-th call that changes a file below a folder fails, writes half, or ends the process.
 *
 * fault_arm(folder, n, kind) begins to count; kind is one of those below. fault_count() says how many calls were counted.
 * Calls that reach the kernel otherwise (io_uring, memory maps) are not seen; nothing here makes them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NO_SPACE = 1, IO_ERROR, SHORT_WRITE, KILL, INTERRUPT, DISK_IS_FULL, READ_ONLY };

static char folder[PATH_MAX];
static size_t folder_length;
static int wanted, kind;
static volatile int counted;

void fault_arm(const char *path, int n, int how)
{
    snprintf(folder, sizeof folder, "%s", path);
    folder_length = strlen(folder);
    wanted = n, kind = how, counted = 0;
}

int fault_count(void) { return counted; }

static int is_below(const char *path)
{
    return folder_length && path && !strncmp(path, folder, folder_length);
}

static int is_below_at(int at, const char *path)
{
    char whole[2 * PATH_MAX], link[64];
    if (!folder_length || !path)
        return 0;
    if (path[0] == '/')
        return is_below(path);
    if (at == AT_FDCWD) {
        if (!getcwd(whole, PATH_MAX))
            return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, whole, PATH_MAX - 1);
        if (length < 0)
            return 0;
        whole[length] = 0;
    }
    size_t length = strlen(whole);
    snprintf(whole + length, sizeof whole - length, "/%s", path);
    return is_below(whole);
}

static int is_file_below(int file)
{
    char link[64], path[PATH_MAX];
    int before = errno;
    if (!folder_length)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_below(path);
}

/* Whether this call is to fail (errno says how), or to be short (*is_short). */
static int strikes(int grows, int *is_short)
{
    int turn = __sync_add_and_fetch(&counted, 1);
    if (kind == DISK_IS_FULL && turn >= wanted && grows) { /* and stays full */
        errno = ENOSPC;
        return 1;
    }
    if (kind == READ_ONLY && turn >= wanted) {
        errno = EROFS;
        return 1;
    }
    if (turn != wanted)
        return 0;
    switch (kind) {
    case NO_SPACE: errno = ENOSPC; return grows;
    case IO_ERROR: errno = EIO; return 1;
    case SHORT_WRITE: if (is_short) *is_short = 1; return 0;
    case KILL: kill(getpid(), SIGKILL); return 0;
    case INTERRUPT: kill(getpid(), SIGINT); return 0;
    }
    return 0;
}

#define REAL(name) (real ? real : (real = dlsym(RTLD_NEXT, #name)))
#define WRAP(type, name, is_ours, grows, arguments, passed)      \
    type name arguments                                          \
    {                                                            \
        static type(*real) arguments;                            \
        REAL(name);                                              \
        if (is_ours && strikes(grows, NULL))                     \
            return -1;                                           \
        return real passed;                                      \
    }
#define WRAP_WRITE(name, arguments, passed, shorter)             \
    ssize_t name arguments                                       \
    {                                                            \
        static ssize_t (*real) arguments;                        \
        int is_short = 0;                                        \
        REAL(name);                                              \
        if (is_file_below(file)) {                               \
            if (strikes(1, &is_short))                           \
                return -1;                                       \
            if (is_short && size > 1)                            \
                return real shorter;                             \
        }                                                        \
        return real passed;                                      \
    }

WRAP_WRITE(write, (int file, const void *content, size_t size), (file, content, size), (file, content, size / 2))
WRAP_WRITE(pwrite, (int file, const void *content, size_t size, off_t at), (file, content, size, at), (file, content, size / 2, at))
WRAP_WRITE(pwrite64, (int file, const void *content, size_t size, off64_t at), (file, content, size, at), (file, content, size / 2, at))
WRAP(ssize_t, writev, is_file_below(file), 1, (int file, const struct iovec *parts, int n), (file, parts, n))
WRAP(ssize_t, copy_file_range, is_file_below(to), 1,
     (int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned flags), (from, from_at, to, to_at, size, flags))
WRAP(ssize_t, sendfile, is_file_below(to), 1, (int to, int from, off_t *at, size_t size), (to, from, at, size))
WRAP(ssize_t, sendfile64, is_file_below(to), 1, (int to, int from, off64_t *at, size_t size), (to, from, at, size))
WRAP(int, fsync, is_file_below(file), 1, (int file), (file))
WRAP(int, fdatasync, is_file_below(file), 1, (int file), (file))
WRAP(int, ftruncate, is_file_below(file), 1, (int file, off_t size), (file, size))
WRAP(int, ftruncate64, is_file_below(file), 1, (int file, off64_t size), (file, size))
WRAP(int, fallocate, is_file_below(file), 1, (int file, int mode, off_t at, off_t size), (file, mode, at, size))
WRAP(int, fchmod, is_file_below(file), 0, (int file, mode_t mode), (file, mode))
WRAP(int, chmod, is_below_at(AT_FDCWD, path), 0, (const char *path, mode_t mode), (path, mode))
WRAP(int, mkdir, is_below_at(AT_FDCWD, path), 1, (const char *path, mode_t mode), (path, mode))
WRAP(int, link, is_below_at(AT_FDCWD, to), 1, (const char *from, const char *to), (from, to))
WRAP(int, linkat, is_below_at(into, to), 1, (int at, const char *from, int into, const char *to, int flags), (at, from, into, to, flags))
WRAP(int, rename, is_below_at(AT_FDCWD, to), 1, (const char *from, const char *to), (from, to))
WRAP(int, renameat, is_below_at(into, to), 1, (int at, const char *from, int into, const char *to), (at, from, into, to))
WRAP(int, unlink, is_below_at(AT_FDCWD, path), 0, (const char *path), (path))
WRAP(int, unlinkat, is_below_at(at, path), 0, (int at, const char *path, int flags), (at, path, flags))
WRAP(int, rmdir, is_below_at(AT_FDCWD, path), 0, (const char *path), (path))

#define WRAP_OPEN(name)                                                                       \
    int name(const char *path, int flags, ...)                                                \
    {                                                                                         \
        static int (*real)(const char *, int, ...);                                           \
        va_list more;                                                                         \
        va_start(more, flags);                                                                \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                             \
        va_end(more);                                                                         \
        REAL(name);                                                                           \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR) && is_below_at(AT_FDCWD, path) && strikes(1, NULL)) \
            return -1;                                                                        \
        return real(path, flags, mode);                                                       \
    }
#define WRAP_OPENAT(name)                                                                     \
    int name(int at, const char *path, int flags, ...)                                        \
    {                                                                                         \
        static int (*real)(int, const char *, int, ...);                                      \
        va_list more;                                                                         \
        va_start(more, flags);                                                                \
        mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;                             \
        va_end(more);                                                                         \
        REAL(name);                                                                           \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR) && is_below_at(at, path) && strikes(1, NULL)) \
            return -1;                                                                        \
        return real(at, path, flags, mode);                                                   \
    }
WRAP_OPEN(open)
WRAP_OPEN(open64)
WRAP_OPENAT(openat)
WRAP_OPENAT(openat64)
