package main

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"unsafe"
)

// What seccomp(2) and seccomp_unotify(2) need and package syscall lacks.
const (
	prSetNoNewPrivs        = 38
	seccompSetModeFilter   = 1
	seccompTSync           = 1 << 0 // all threads of the process
	seccompNewListener     = 1 << 3
	seccompTSyncESRCH      = 1 << 4 // lets the two go together
	seccompAllow           = 0x7fff0000
	seccompUserNotif       = 0x7fc00000
	seccompContinue        = 1
	seccompIoctlNotifRecv  = 0xc0502100
	seccompIoctlNotifySend = 0xc0182101
)

// notification is struct seccomp_notif.
type notification struct {
	id         uint64
	pid, flags uint32
	number     int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

// notified is struct seccomp_notif_resp.
type notified struct {
	id         uint64
	value      int64
	err, flags uint32
}

// watchDisk has the kernel ask this process itself before each of its pwrite64 and fdatasync, which are bbolt's alone; they
// go on when called returns. It can't be undone. bbolt has a seam at the opening of its file, but none at what it does with it.
func watchDisk(called func(flush bool)) error {
	number, ok := map[string]uintptr{"amd64": 317, "arm64": 277}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("watch the disk: seccomp on %s: %w", runtime.GOARCH, errors.ErrUnsupported)
	}
	program := []syscall.SockFilter{
		{Code: syscall.BPF_LD | syscall.BPF_W | syscall.BPF_ABS, K: 0}, // the system call's number
		{Code: syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K, K: syscall.SYS_PWRITE64, Jt: 2},
		{Code: syscall.BPF_JMP | syscall.BPF_JEQ | syscall.BPF_K, K: syscall.SYS_FDATASYNC, Jt: 1},
		{Code: syscall.BPF_RET | syscall.BPF_K, K: seccompAllow},
		{Code: syscall.BPF_RET | syscall.BPF_K, K: seccompUserNotif},
	}
	filter := syscall.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	runtime.LockOSThread() // no_new_privs is the thread's, until the filter is all threads'
	defer runtime.UnlockOSThread()
	if _, _, e := syscall.RawSyscall6(syscall.SYS_PRCTL, prSetNoNewPrivs, 1, 0, 0, 0, 0); e != 0 {
		return fmt.Errorf("watch the disk: prctl: %w", e)
	}
	fd, _, e := syscall.RawSyscall(number, seccompSetModeFilter, seccompTSync|seccompNewListener|seccompTSyncESRCH,
		uintptr(unsafe.Pointer(&filter)))
	runtime.KeepAlive(program)
	if e != 0 {
		return fmt.Errorf("watch the disk: seccomp: %w", e)
	}
	go func() {
		for {
			var n notification
			if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, fd, seccompIoctlNotifRecv, uintptr(unsafe.Pointer(&n))); e != 0 {
				continue // EINTR, or the call was taken back by a signal
			}
			called(n.number == syscall.SYS_FDATASYNC)
			r := notified{id: n.id, flags: seccompContinue}
			// It fails if a signal has taken the call back; the thread makes it again then.
			syscall.Syscall(syscall.SYS_IOCTL, fd, seccompIoctlNotifySend, uintptr(unsafe.Pointer(&r)))
		}
	}()
	return nil
}
