package hostile

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/qcow2"
	"github.com/droverproject/drover/storage"
	"github.com/droverproject/drover/test/harness"
	"github.com/droverproject/drover/test/peer"
)

var record = flag.Bool("record", false, "print what stock does with each image, instead of comparing it with the tables")

// damage is one line of a table.
type damage struct {
	name  string
	base  string
	at    int64 // the guest cluster that is read and written
	spoil func(*img)
	// stock is what stock 7.2 does when asked for info, check, read, write:
	//   info:  ok, refused, crash
	//   check: clean, leaks, errors (exit status 2), failed (exit status 1: not opened, or something not checked), crash
	//   read:  ok, wrong (other bytes than were written), eio (opened, but the request failed), refused (not opened), crash
	//   write: ok, eio, refused, crash
	stock string
	// ours is what drover does where that is not what stock does, and why gives the reason. It must be stricter, unless
	// lenient says that there is a reason for that as well.
	ours, why string
	lenient   bool
}

// Limits for one action of drover on one image. The images are below 12 MiB, and the largest table that a field can claim
// without being refused is an L1 table of 32 MiB.
const (
	memoryLimit = 160 << 20        // bytes allocated in all, by the whole action
	timeLimit   = 10 * time.Second // on a machine that does other work too; hardly any needs a hundredth
	// KiB of address space. A Go program reserves more than it uses; stock QEMU fails to start its threads where it has
	// less. Neither may open more than 128 files: an image that names itself has stock open it again and again.
	ourSpace, stockSpace = 3 << 20, 4 << 20
)

var (
	// measured lets one action be measured at a time, and no program start meanwhile: until it runs, a new process has a
	// copy of every open file, and with it the locks on them.
	measured sync.RWMutex
	programs = make(chan struct{}, 2) // how many programs may run
)

// result is how a program ended.
type result struct {
	code     int // -1 when a signal ended it
	out, err string
}

// program runs a program, with so much address space, in a folder: stock QEMU looks for a data file where it runs.
func program(t testing.TB, dir string, space int, name string, args ...string) result {
	t.Helper()
	programs <- struct{}{}
	defer func() { <-programs }()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	limited := []string{"-c", fmt.Sprintf(`ulimit -v %d; ulimit -n 128; exec "$@"`, space), "sh", peer.Path(name)}
	cmd := exec.CommandContext(ctx, "sh", append(limited, args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &stdout, &stderr
	measured.RLock()
	err := cmd.Start()
	measured.RUnlock()
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if ctx.Err() != nil {
		return result{code: -1, err: "no end within a minute"}
	}
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("running %s: %v", name, err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// place writes an image, and what it may refer to, into a new folder.
func place(t testing.TB, data []byte) (dir, image string) {
	t.Helper()
	dir = t.TempDir()
	image = filepath.Join(dir, "image.qcow2")
	harness.OK(t, os.WriteFile(image, data, 0o600))
	harness.OK(t, os.WriteFile(filepath.Join(dir, "base.raw"), bytes.Repeat([]byte{backingContent}, 64<<10), 0o600))
	if made.data != nil {
		harness.OK(t, os.WriteFile(filepath.Join(dir, "data.raw"), made.data, 0o600))
	}
	return dir, image
}

var checkWords = map[int]string{0: "clean", 1: "failed", 2: "errors", 3: "leaks", -1: "crash"}

func infoWord(r result) string {
	switch {
	case r.code < 0:
		return "crash"
	case r.code > 0:
		return "refused"
	}
	return "ok"
}

// ioWord says how an action of qemu-io ended.
func ioWord(r result) string {
	switch {
	case r.code < 0:
		return "crash"
	case strings.Contains(r.out, "verification failed"):
		return "wrong"
	case strings.Contains(r.out+r.err, "can't open"):
		return "refused"
	case r.code != 0 || strings.Contains(r.out, "failed: "):
		return "eio"
	}
	return "ok"
}

// content is what a guest cluster was written with.
func content(cluster int64) byte {
	switch {
	case cluster < zeroCluster:
		return dataByte
	case cluster == squeezed || cluster == squeezed+1:
		return squeezedByte
	case cluster == farCluster:
		return farByte
	}
	return 0
}

const ioBytes = 4096 // of one read or write; less where a cluster is less

// stockOutcome asks stock QEMU. It also returns the number of corruptions in the image that stock has written to.
func stockOutcome(t testing.TB, d damage, data []byte) (string, int64) {
	t.Helper()
	b := baseNamed(t, d.base)
	dir, image := place(t, data)
	words := []string{infoWord(program(t, dir, stockSpace, "qemu-img", "info", "-f", "qcow2", image))}
	args := []string{"check", "-q", "-f", "qcow2", image}
	if b.encrypt {
		args = []string{"check", "-q", "--object", "secret,id=s,data=" + secret, "--image-opts",
			"driver=qcow2,encrypt.key-secret=s,file.filename=" + image}
	}
	words = append(words, checkWords[program(t, dir, stockSpace, "qemu-img", args...).code])
	read := fmt.Sprintf("read -q -P %d %d %d", content(d.at), d.at*b.cs, ioBytes)
	words = append(words, ioWord(program(t, dir, stockSpace, "qemu-io", append(stockArgs(b, image, true), "-c", read)...)))
	write := fmt.Sprintf("write -q -P 119 %d %d", d.at*b.cs, ioBytes)
	words = append(words, ioWord(program(t, dir, stockSpace, "qemu-io", append(stockArgs(b, image, false), "-c", write)...)))
	return strings.Join(words, " "), corruptions(ourCheck(t, image))
}

// corruptions counts what is wrong with an image; all is, when it cannot be checked.
func corruptions(rep *qcow2.CheckReport, err error) int64 {
	if err != nil {
		return math.MaxInt64
	}
	return rep.Corruptions + rep.CheckErrors
}

// ourOutcome does the same with the library. Each action must keep within its limits.
func ourOutcome(t testing.TB, d damage, data []byte) (string, int64) {
	t.Helper()
	b := baseNamed(t, d.base)
	_, image := place(t, data)
	o := block.OpenOptions{Format: "qcow2", Policy: block.AllowAll(), ProbeBacking: true, ReadOnly: true}
	var words []string
	act := func(name string, f func() string) {
		measured.Lock()
		defer measured.Unlock()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		began := time.Now()
		word := f()
		took := time.Since(began)
		runtime.ReadMemStats(&after)
		if used := after.TotalAlloc - before.TotalAlloc; used > memoryLimit || took > timeLimit {
			t.Errorf("%s took %d MiB and %v", name, used>>20, took)
		}
		words = append(words, word)
	}
	act("info", func() string { return ourInfo(image) })
	act("check", func() string { return checkWord(ourCheck(t, image)) })
	act("read", func() string { return ourRead(image, d, b, o) })
	act("write", func() string { return ourWrite(image, d, b, o) })
	if words[3] == "refused" {
		if now, err := os.ReadFile(image); err != nil || !bytes.Equal(now, data) {
			t.Errorf("the image was not opened for writing, and yet its bytes have changed (%v)", err)
		}
	}
	return strings.Join(words, " "), corruptions(ourCheck(t, image))
}

func ourInfo(image string) string {
	f, err := storage.OpenFile(image, storage.OpenOptions{ReadOnly: true})
	if err != nil {
		return "refused"
	}
	defer f.Close()
	if _, err := qcow2.ReadInfo(context.Background(), f); err != nil {
		return "refused"
	}
	return "ok"
}

func ourCheck(t testing.TB, image string) (*qcow2.CheckReport, error) {
	f, err := storage.OpenFile(image, storage.OpenOptions{ReadOnly: true})
	harness.OK(t, err)
	defer f.Close()
	rep, err := qcow2.CheckFile(context.Background(), f, qcow2.CheckOptions{})
	if err != nil {
		return nil, err
	}
	return rep, nil
}

func checkWord(rep *qcow2.CheckReport, err error) string {
	switch {
	case err != nil || rep.CheckErrors > 0:
		return "failed"
	case rep.Corruptions > 0:
		return "errors"
	case rep.Leaks > 0:
		return "leaks"
	}
	return "clean"
}

// openImage opens an image as drover's programs do, an encrypted one with its key.
func openImage(image string, b base, o block.OpenOptions) (block.Device, error) {
	if !b.encrypt {
		return block.Open(context.Background(), image, o)
	}
	f, err := storage.OpenFile(image, storage.OpenOptions{ReadOnly: o.ReadOnly})
	if err != nil {
		return nil, err
	}
	im, err := qcow2.Open(context.Background(), f, qcow2.Options{
		ReadOnly: o.ReadOnly, Encrypt: &qcow2.EncryptOptions{Secret: []byte(secret)},
	})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return im, nil
}

func ourRead(image string, d damage, b base, o block.OpenOptions) string {
	dev, err := openImage(image, b, o)
	if err != nil {
		return "refused"
	}
	defer dev.Close()
	p := make([]byte, ioBytes)
	if err := dev.ReadAt(context.Background(), p, d.at*b.cs); err != nil {
		return "eio"
	}
	if !bytes.Equal(p, bytes.Repeat([]byte{content(d.at)}, len(p))) {
		return "wrong"
	}
	return "ok"
}

func ourWrite(image string, d damage, b base, o block.OpenOptions) string {
	o.ReadOnly = false
	ctx := context.Background()
	dev, err := openImage(image, b, o)
	if err != nil {
		return "refused"
	}
	p := bytes.Repeat([]byte{119}, ioBytes)
	err = errors.Join(dev.WriteAt(ctx, p, d.at*b.cs, 0), dev.Flush(ctx))
	if err == nil {
		got := make([]byte, ioBytes)
		if err := dev.ReadAt(ctx, got, d.at*b.cs); err != nil || !bytes.Equal(got, p) {
			return "lost"
		}
	}
	if err := errors.Join(err, dev.Close()); err != nil {
		return "eio"
	}
	return "ok"
}

// theProgram runs every command of drover that reads an image, with little room, and demands that it ends in good order.
func theProgram(t testing.TB, data []byte) {
	t.Helper()
	dir, image := place(t, data)
	for _, command := range []string{"info", "check", "map"} {
		r := program(t, dir, ourSpace, harness.Binary(t), command, "-f", "qcow2", "--output=json", image)
		highest := map[string]int{"info": 1, "map": 1, "check": 3}[command]
		if r.code < 0 || r.code > highest || strings.Contains(r.err, "goroutine ") {
			t.Errorf("drover %s ends with %d:\n%.2000s", command, r.code, r.err)
		}
		if r.code == 1 && r.err == "" {
			t.Errorf("drover %s fails without a word", command)
		}
	}
}

// severity orders outcomes: what is stricter is higher.
var severity = map[string]int{
	"ok": 0, "clean": 0, "wrong": 0, "leaks": 1, "errors": 2, "eio": 3, "failed": 3, "refused": 4, "crash": 0, "lost": -1,
}

// judge runs one line of a table.
func judge(t *testing.T, d damage) {
	b := baseNamed(t, d.base)
	m := &img{t, made.bytes(t, b)}
	d.spoil(m)
	stock, theirHarm := stockOutcome(t, d, m.b)
	said, ourHarm := ourOutcome(t, d, m.b)
	if *record {
		fmt.Printf("RECORD\t%s\t%s\t%s\n", d.name, stock, said)
		return
	}
	// A refcount of 0 for a cluster in use, for example, misleads any writer that does not check the whole image first.
	if _, before := place(t, m.b); ourHarm > max(theirHarm, corruptions(ourCheck(t, before))) {
		t.Errorf("a write has made things worse: %d corruptions, %d when stock writes", ourHarm, theirHarm)
	}
	if stock != d.stock {
		if stockIsThatOfTheTables() {
			t.Errorf("stock says %q, the table %q", stock, d.stock)
		} else {
			t.Logf("this version of stock says %q, 7.2 says %q", stock, d.stock)
		}
	}
	ours := strings.Fields(said)
	want := strings.Fields(d.stock)
	allowed := strings.Fields(d.ours)
	differs := false
	for i, action := range []string{"info", "check", "read", "write"} {
		if ours[i] == want[i] {
			continue
		}
		differs = true
		if len(allowed) != len(ours) || allowed[i] != ours[i] {
			t.Errorf("%s: drover says %q, stock %q, the table %q", action, ours[i], want[i], d.ours)
		}
		if severity[ours[i]] < severity[want[i]] && !d.lenient {
			t.Errorf("%s: drover says %q, which is more lenient than stock's %q", action, ours[i], want[i])
		}
	}
	if differs == (d.ours == "") || differs == (d.why == "") {
		t.Errorf("drover says %q, stock %q; the table says %q, because %q", said, d.stock, d.ours, d.why)
	}
	theProgram(t, m.b)
}
