/* The first program of the static binary: unpack the second, which freeze.py put behind this one,
 * and become it. It stands in the place of staticx's bootloader and reads staticx's archive.
 *
 * Rule 1: no process stays behind: signals, exit codes and PID 1 are Python's own.
 * Rule 2: the second program gets an empty environment. What the image set is handed on in a file
 *         without a name: no loader, libc or bootloader reads a variable of the image, and none
 *         is to be seen in /proc/PID/environ.
 * Rule 3: signals wait from the first statement on until Python lets them in.
 * Rule 4: the directory has a lock for as long as it is in use: who gets that may remove it.
 * Rule 5: what fails in one directory is tried in the next; then there is one sentence, and exit 1.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <zlib.h>

#define PROGRAM "sagemaker-shim"
#define FAILURE "/opt/ml/output/failure"
#define LOADER "/.staticx.interp"
#define FIRST_DESCRIPTOR 10 /* the standard streams that are closed stay closed */
#define BLOCK 512           /* of a tar */
#define PLACEHOLDER 256     /* staticx's MAX_INTERP_LEN and MAX_RPATH_LEN */
#define ATTEMPTS 10
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

struct member {
    const char *name, *target;
    char type;
    const unsigned char *data; /* the length of what it holds (8 bytes), and that deflated */
    size_t size;
};

struct place {
    int fd;
    char path[PLACEHOLDER];
};

static char tried[4096];

static void note(const char *format, ...)
{
    size_t length = strlen(tried);
    va_list values;
    va_start(values, format);
    vsnprintf(tried + length, sizeof tried - length, format, values);
    va_end(values);
}

/* Leave with a sentence: a JSON line as the shim's own are, text on a terminal. */
static void fail(const char *sentence)
{
    char line[2 * sizeof tried], *end = line;
    for (const char *at = sentence; *at; at++) {
        int plain = *at >= ' ' && *at <= '~' && *at != '"' && *at != '\\';
        *end++ = plain ? *at : '?';
    }
    *end = 0;
    if (isatty(STDERR_FILENO))
        dprintf(STDERR_FILENO, PROGRAM ": %s\n", line);
    else
        dprintf(STDERR_FILENO,
                "{\"log\": \"%s\", \"level\": \"ERROR\", \"source\": \"stderr\", "
                "\"internal\": true, \"task\": null}\n", line);
    unlink(FAILURE);
    int fd = open(FAILURE, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0644);
    if (fd >= 0)
        dprintf(fd, "%.1024s", line);
    exit(1);
}

/* Return the descriptor under a number that is nobody's standard stream; it survives execve(). */
static int move_up(int fd)
{
    int moved = fd < 0 ? fd : fcntl(fd, F_DUPFD, FIRST_DESCRIPTOR);
    if (fd >= 0)
        close(fd);
    return moved;
}

static int write_all(int fd, const void *data, size_t size)
{
    for (const char *at = data; size > 0;) {
        ssize_t written = write(fd, at, size);
        if (written < 0)
            return -1;
        at += written;
        size -= written;
    }
    return 0;
}

/* Return where the section .staticx.archive of this program begins. */
static const unsigned char *find_archive(void)
{
    struct stat status;
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) < 0)
        fail("The program cannot read itself: it needs /proc, and to be readable");
    const unsigned char *self = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    close(fd);
    if (self == MAP_FAILED)
        fail("The program cannot be mapped into memory");
    const Elf64_Ehdr *header = (const void *)self;
    const Elf64_Shdr *sections = (const void *)(self + header->e_shoff);
    const char *names = (const char *)self + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++)
        if (!strcmp(names + sections[i].sh_name, ".staticx.archive"))
            return self + sections[i].sh_offset;
    fail("The program is damaged: it has no archive");
    return NULL;
}

/* Read the header at a place of the archive; return the place of the next, NULL at the end. */
static const unsigned char *next_member(const unsigned char *at, struct member *member)
{
    if (!*at)
        return NULL;
    member->name = (const char *)at;
    member->size = strtoul((const char *)at + 124, NULL, 8);
    member->type = at[156];
    member->target = (const char *)at + 157;
    member->data = at + BLOCK;
    return member->data + (member->size + BLOCK - 1) / BLOCK * BLOCK;
}

/* Put a text in the place of the letters that staticx left for it. */
static int fill(char *data, size_t size, char letter, const char *text)
{
    char letters[PLACEHOLDER];
    memset(letters, letter, PLACEHOLDER);
    char *place = memmem(data, size, letters, PLACEHOLDER);
    if (!place || strlen(text) >= PLACEHOLDER) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(place, text);
    return 0;
}

/* Have the second program look for its loader and its libraries where they are. */
static int fill_paths(char *data, size_t size, const char *path)
{
    char loader[PLACEHOLDER + sizeof LOADER];
    snprintf(loader, sizeof loader, "%s" LOADER, path);
    return fill(data, size, 'i', loader) < 0 ? -1 : fill(data, size, 'r', path);
}

static int write_file(const struct place *place, const struct member *member)
{
    unsigned long size;
    memcpy(&size, member->data, sizeof size);
    /* Not into the file's own pages: on a full disk that ends in SIGBUS. */
    char *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
        return -1;
    uLongf length = size;
    int code = uncompress((Bytef *)data, &length, member->data + sizeof size,
                          member->size - sizeof size);
    if (code != Z_OK || length != size)
        fail("The program is damaged: its archive cannot be unpacked");
    int fd = -1, failed = 1;
    if (strcmp(member->name, PROGRAM) || fill_paths(data, size, place->path) == 0) {
        fd = openat(place->fd, member->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0700);
        failed = fd < 0 || write_all(fd, data, size) < 0 || fchmod(fd, 0700) < 0;
    }
    int error = errno;
    if (fd >= 0 && close(fd) < 0 && !failed) {
        failed = 1;
        error = errno;
    }
    munmap(data, size);
    errno = error;
    return failed ? -1 : 0;
}

static int extract(const struct place *place, const unsigned char *archive)
{
    struct member member;
    while ((archive = next_member(archive, &member))) {
        int failed;
        if (member.type == '5')
            failed = mkdirat(place->fd, member.name, 0700);
        else if (member.type == '2')
            failed = symlinkat(member.target, place->fd, member.name);
        else
            failed = write_file(place, &member);
        if (failed)
            return -1;
    }
    return 0;
}

/* Remove what extract() made: the files, then the directories, which stand in front of what is
 * in them. */
static void clear(const struct place *place, const unsigned char *archive)
{
    struct member member;
    for (int depth = 0; depth < 4; depth++)
        for (const unsigned char *at = archive; (at = next_member(at, &member));)
            unlinkat(place->fd, member.name, member.type == '5' ? AT_REMOVEDIR : 0);
    rmdir(place->path);
    close(place->fd);
}

/* Make a directory that nobody else enters, and lock it. */
static int make_place(const char *root, struct place *place)
{
    char boot[9] = "", path[4096], link[64];
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, boot, sizeof boot - 1) < 0)
        strcpy(boot, "unknown");
    close(fd);
    for (int attempt = 0; attempt < ATTEMPTS; attempt++) {
        struct stat status;
        snprintf(path, sizeof path, "%s/" PROGRAM "-%s-XXXXXX", root, boot);
        if (!mkdtemp(path))
            return -1;
        place->fd = move_up(open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW));
        if (place->fd < 0)
            continue;
        /* Where nothing can be locked, nobody else can either. */
        int is_locked = flock(place->fd, LOCK_EX | LOCK_NB) == 0 || errno != EWOULDBLOCK;
        if (is_locked && fstat(place->fd, &status) == 0 && status.st_nlink > 0) {
            snprintf(link, sizeof link, "/proc/self/fd/%d", place->fd);
            ssize_t length = readlink(link, place->path, sizeof place->path);
            if (length > 0 && (size_t)length < PLACEHOLDER - strlen(LOADER)) {
                place->path[length] = 0;
                return 0;
            }
            rmdir(path);
            errno = ENAMETOOLONG;
            return -1;
        }
        close(place->fd); /* taken for a leftover by another start */
    }
    errno = EAGAIN;
    return -1;
}

/* Return a descriptor of the environment, each variable with its NUL, without a name. */
static int save_environment(char **environment)
{
    int fd = memfd_create("environment", MFD_NOEXEC_SEAL);
    if (fd < 0) /* before Linux 6.3 */
        fd = memfd_create("environment", 0);
    fd = move_up(fd);
    if (fd < 0)
        fail("The kernel refuses memfd_create()");
    for (; *environment; environment++)
        if (write_all(fd, *environment, strlen(*environment) + 1) < 0)
            fail("The environment cannot be kept in memory");
    lseek(fd, 0, SEEK_SET);
    return fd;
}

/* Unpack the program below root and become it; return if that fails, and leave nothing. */
static void run_from(const char *root, const unsigned char *archive, char **argv, int environment)
{
    struct place place;
    struct statvfs system;
    if (statvfs(root, &system) == 0 && system.f_flag & ST_NOEXEC) {
        note("%s (mounted noexec); ", root);
        return;
    }
    if (make_place(root, &place) < 0) {
        note("%s (%s); ", root, strerror(errno));
        return;
    }
    if (extract(&place, archive) == 0) {
        char program[PLACEHOLDER + sizeof PROGRAM], directory[40], variables[40];
        char file[PATH_MAX + 16] = "SHIM_PROGRAM=";
        char *own[] = {directory, variables, file, NULL};
        if (readlink("/proc/self/exe", file + strlen(file), PATH_MAX) < 0)
            note("/proc/self/exe (%s); ", strerror(errno));
        snprintf(program, sizeof program, "%s/" PROGRAM, place.path);
        snprintf(directory, sizeof directory, "SHIM_DIRECTORY=%d", place.fd);
        snprintf(variables, sizeof variables, "SHIM_ENVIRONMENT=%d", environment);
        execve(program, argv, own);
    }
    note("%s (%s); ", root, strerror(errno));
    clear(&place, archive);
}

int main(int argc, char **argv, char **environment)
{
    (void)argc;
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, NULL);
    const unsigned char *archive = find_archive();
    int variables = save_environment(environment);
    const char *first = getenv("TMPDIR");
    if (first && *first) {
        note("TMPDIR=");
        run_from(first, archive, argv, variables);
    }
    run_from("/tmp", archive, argv, variables);
    run_from("/var/tmp", archive, argv, variables);
    run_from("/dev/shm", archive, argv, variables);
    char sentence[sizeof tried + 200];
    tried[strlen(tried) - 2] = 0;
    snprintf(sentence, sizeof sentence, "No temporary directory can hold the program: set "
             "TMPDIR to one with 21 MB free where programs may be executed; tried %s", tried);
    fail(sentence);
}
