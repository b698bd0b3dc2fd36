package vm

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

//go:embed jobs/init.sh
var initScript []byte

//go:embed jobs/lib.sh
var libScript []byte

// Job is one boot.
type Job struct {
	Drover string // the program, static
	Script []byte // run by sh, with the functions of jobs/lib.sh
	// Folder is a scratch folder. Files in Folder/disk are on the guest's disk at /disk.
	Folder string
	Files  map[string]string // further host files by their names in the guest
	Log    io.Writer         // gets the console
	// Tools is a disk from PrepareTools, if the job needs it.
	Tools    string
	DiskSize string // of the guest's disk; empty: 1536M
	Memory   int    // of the guest in MiB; 0: 1536
	// Count has the guest's clock count instructions, a nanosecond each, and not the host's time: then what else the host
	// does changes no figure. The guest has one processor.
	Count bool
}

// Result is one thing that a job has looked at.
type Result struct {
	Name string
	OK   bool
	Text string
}

// ErrNoEnd is wrapped when the guest stopped before its job was done.
var ErrNoEnd = errors.New("the job did not end")

const (
	defaultDisk   = "1536M"
	defaultMemory = 1536
)

var resultLine = regexp.MustCompile(`(?m)^RESULT (\S+) (ok|FAIL) ?([^\n]*)`)

// Run boots and waits for the end.
func (vm *VM) Run(ctx context.Context, j Job) ([]Result, error) {
	initrd := filepath.Join(j.Folder, "initrd")
	if err := vm.pack(initrd, j); err != nil {
		return nil, fmt.Errorf("packing the job: %w", err)
	}
	disk := filepath.Join(j.Folder, "disk.ext4")
	content := filepath.Join(j.Folder, "disk")
	if err := os.MkdirAll(content, 0o777); err != nil {
		return nil, err
	}
	mke2fs, err := lookup("mke2fs")
	if err != nil {
		return nil, err
	}
	if _, err := output("", mke2fs, "-q", "-F", "-t", "ext4", "-d", content, disk, cmp.Or(j.DiskSize, defaultDisk)); err != nil {
		return nil, err
	}
	var console strings.Builder
	processor := []string{"-accel", "tcg,thread=multi", "-smp", "2"}
	if j.Count {
		processor = []string{"-accel", "tcg,thread=single", "-smp", "1", "-icount", "shift=0"}
	}
	// With erms and fsrm the kernel would copy memory by an instruction that emulation does byte by byte.
	args := append(processor, "-cpu", "max,-erms,-fsrm", "-m", strconv.Itoa(cmp.Or(j.Memory, defaultMemory)),
		"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
		// The kernel would not trust the processor's clock, and its other clocks are devices, each look at which is an exit.
		"-kernel", vm.kernel, "-initrd", initrd, "-append", "console=ttyS0 quiet panic=-1 tsc=reliable clocksource=tsc",
		"-drive", "if=virtio,format=raw,cache=unsafe,file="+disk)
	if j.Tools != "" {
		args = append(args, "-drive", "if=virtio,format=raw,read-only=on,file="+j.Tools)
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.Stdout = &console
	if j.Log != nil {
		cmd.Stdout = io.MultiWriter(&console, j.Log)
	}
	cmd.Stderr = cmd.Stdout
	err = cmd.Run()
	text := strings.ReplaceAll(console.String(), "\r", "")
	results := parseResults(text)
	if err != nil {
		return results, fmt.Errorf("qemu: %w", err)
	}
	if !strings.Contains(text, "\nJOB-DONE") {
		return results, ErrNoEnd
	}
	return results, nil
}

func parseResults(text string) []Result {
	var results []Result
	for _, m := range resultLine.FindAllStringSubmatch(text, -1) {
		results = append(results, Result{m[1], m[2] == "ok", m[3]})
	}
	return results
}

// pack puts the job's archive behind the prepared one: the kernel unpacks both.
func (vm *VM) pack(name string, j Job) (err error) {
	base, err := os.Open(vm.initrd)
	if err != nil {
		return err
	}
	defer base.Close()
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	n, err := io.Copy(f, base)
	if err != nil {
		return err
	}
	if _, err := f.Write(make([]byte, -n&3)); err != nil {
		return err
	}
	a := newArchive(f)
	a.file("init", initScript)
	a.file("job/lib.sh", libScript)
	a.file("job/run", j.Script)
	files := map[string]string{"bin/drover": j.Drover}
	for guest, host := range j.Files {
		files[guest] = host
	}
	for guest, host := range files {
		data, err := os.ReadFile(host)
		if err != nil {
			return err
		}
		a.file(guest, data)
	}
	return a.close()
}

// Extract copies a file from the guest's disk of a job that has ended.
func Extract(j Job, guest, host string) error {
	debugfs, err := lookup("debugfs")
	if err != nil {
		return err
	}
	out, err := output("", debugfs, "-R", fmt.Sprintf("dump %s %s", guest, host), filepath.Join(j.Folder, "disk.ext4"))
	if err != nil {
		return err
	}
	if _, err := os.Stat(host); err != nil {
		return fmt.Errorf("no %s on the guest's disk: %s", guest, out)
	}
	return nil
}
