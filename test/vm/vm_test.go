package vm

import (
	"context"
	_ "embed"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// bootTimeout bounds a boot with its job. Software emulation on a busy host is slow.
const bootTimeout = 9 * time.Minute

// machine prepares the virtual machine, or skips the test.
func machine(t *testing.T) *VM {
	t.Helper()
	if os.Getenv("DROVER_VM") == "" {
		t.Skip("boots a virtual machine: set DROVER_VM=1, or run make test-vm")
	}
	cache, err := filepath.Abs("../../out/vm")
	if err != nil {
		t.Fatal(err)
	}
	vm, err := Prepare(cache)
	if errors.Is(err, ErrMissing) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// drover returns the program that runs in the guest, linked statically.
func drover(t *testing.T) string {
	t.Helper()
	if bin := os.Getenv("DROVER_BIN"); bin != "" {
		return bin
	}
	bin := filepath.Join(t.TempDir(), "drover")
	cmd := exec.Command("go", "build", "-o", bin, "github.com/droverproject/drover/cmd/drover")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building drover: %v\n%s", err, out)
	}
	return bin
}

func host(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// newJob makes a scratch folder with an empty disk folder.
func newJob(t *testing.T, script []byte) Job {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "disk"), 0o777); err != nil {
		t.Fatal(err)
	}
	// The console stays behind for whoever has to find out what went wrong.
	log, err := os.Create(filepath.Join("../../out/vm", t.Name()+".log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = log.Close() })
	t.Logf("the guest's console is in out/vm/%s.log", t.Name())
	return Job{Drover: drover(t), Script: script, Folder: dir, Log: log}
}

// run boots the job and fails the test for whatever failed in it.
func run(t *testing.T, vm *VM, j Job) []Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
	defer cancel()
	results, err := vm.Run(ctx, j)
	for _, r := range results {
		if !r.OK {
			t.Errorf("%s: %s", r.Name, r.Text)
		}
	}
	if err != nil {
		t.Errorf("after %d results: %v", len(results), err)
	}
	return results
}

// clean has the host's qemu-img check an image of the guest's disk. killed: its server was killed, which may leave clusters
// that nothing points to; they must be all that is wrong.
func clean(t *testing.T, j Job, name string, killed bool) {
	t.Helper()
	file := filepath.Join(j.Folder, filepath.Base(name))
	if err := Extract(j, name, file); err != nil {
		t.Error(err)
		return
	}
	if killed {
		const onlyLeaks = 3
		out, err := exec.Command("qemu-img", "check", "-q", file).CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == onlyLeaks) {
			t.Errorf("qemu-img check %s: %v\n%s", name, err, out)
			return
		}
		host(t, "qemu-img", "check", "-q", "-r", "leaks", file)
	}
	if out, err := exec.Command("qemu-img", "check", file).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check %s: %v\n%s", name, err, out)
	}
	if out, err := exec.Command(j.Drover, "check", file).CombinedOutput(); err != nil {
		t.Errorf("drover check %s: %v\n%s", name, err, out)
	}
}

//go:embed jobs/disk.sh
var diskScript []byte

func TestDisk(t *testing.T) {
	vm := machine(t)
	j := newJob(t, diskScript)
	for name, size := range map[string]string{"a.qcow2": "256M", "b.qcow2": "32M"} {
		host(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(j.Folder, "disk", name), size)
	}
	if results := run(t, vm, j); len(results) != 55 {
		t.Errorf("only %d results", len(results))
	}
	clean(t, j, "/a.qcow2", true)
	clean(t, j, "/b.qcow2", false)
}

//go:embed jobs/iscsi.sh
var iscsiScript []byte

// conformance are the tests of libiscsi 1.19 that fail for a reason which is not ours, or not for us to change. A test that
// is not named here has to pass.
var conformance = map[string]string{
	"GetLBAStatus.UnmapSingle": "asks for the status at LBA n+1 and expects a descriptor that begins at n+8, where a physical" +
		" block has 8 logical ones; the standard has it begin where it was asked for",
	"ReceiveCopyResults.CopyStatus": "wants a list identifier unknown that earlier tests have used in other sessions; the kernel" +
		" does not say which session a command is from",
	"iSCSIdatasn.iSCSIDataSnInvalid": "how LIO treats a wrong DataSN",
	"Reserve6.Logout":                "the kernel answers RESERVE itself, and on a busy host ends a session later than the test waits",
	"Reserve6.ITNexusLoss":           "as Reserve6.Logout",
	"Sanitize.Reset":                 "wants a SANITIZE with IMMED to be under way still when the answer is there; a small disk is wiped by then",
}

// residualSuite is about the residual counts of iSCSI. The kernel reckons an overflow from the descriptor block only for its own
// backstores, and for TCM-User takes a count of reads alone; status and data, which these tests look at too, have to be right.
const residualSuite = "iSCSIResiduals"

var residualAssert = regexp.MustCompile(`^ +\d+\. .*CU_ASSERT_EQUAL\(task->residual(_status)?,`)

var (
	suiteLine = regexp.MustCompile(`^Suite: (\S+)`)
	testLine  = regexp.MustCompile(`^ +Test: (\S+) \.\.\.`)
)

// TestISCSI has libiscsi's conformance tests judge a disk over the kernel's iSCSI target, and lists the result of each suite.
func TestISCSI(t *testing.T) {
	long(t)
	vm := machine(t)
	j := newJob(t, iscsiScript)
	host(t, "qemu-img", "create", "-q", "-f", "qcow2", filepath.Join(j.Folder, "disk", "a.qcow2"), "128M")
	run(t, vm, j)
	text, err := os.ReadFile(filepath.Join("../../out/vm", t.Name()+".log"))
	if err != nil {
		t.Fatal(err)
	}
	var suite, test string
	var suites []string
	passed, failed, skipped := map[string]int{}, map[string][]string{}, map[string]int{}
	end := func(ok bool) {
		switch name := suite + "." + test; {
		case ok:
			passed[suite]++
		case suite == residualSuite: // its assertions follow, and are looked at one by one
			failed[suite] = append(failed[suite], test)
		case conformance[name] != "":
			t.Logf("%s: %s", name, conformance[name])
			failed[suite] = append(failed[suite], test)
		default:
			t.Errorf("%s failed", name)
			failed[suite] = append(failed[suite], test)
		}
		test = ""
	}
	for line := range strings.SplitSeq(strings.ReplaceAll(string(text), "\r", ""), "\n") {
		switch m := testLine.FindStringSubmatch(line); {
		case suiteLine.MatchString(line):
			suite = suiteLine.FindStringSubmatch(line)[1]
			suites = append(suites, suite)
		case m != nil:
			test = m[1]
		}
		switch {
		case test != "" && strings.HasSuffix(line, "passed"):
			end(true)
		case test != "" && strings.HasSuffix(line, "FAILED"):
			end(false)
		case suite == residualSuite && strings.Contains(line, " - CU_") && !residualAssert.MatchString(line):
			t.Errorf("%s: %s", suite, strings.TrimSpace(line))
		case strings.Contains(line, "[SKIPPED]"):
			skipped[suite]++
			t.Logf("%s: %s", suite, strings.TrimSpace(line))
		}
	}
	total := 0
	for _, s := range suites {
		t.Logf("%-24s passed %2d  failed %2d %v  parts skipped %d", s, passed[s], len(failed[s]), failed[s], skipped[s])
		total += passed[s] + len(failed[s])
	}
	if total < 200 {
		t.Errorf("only %d tests ran", total)
	}
	clean(t, j, "/a.qcow2", false)
}
