package cli

import (
	"bufio"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/droverproject/drover/internal/certtest"
)

func TestServeSecurityArguments(t *testing.T) {
	t.Chdir(t.TempDir())
	mustDrover(t, "create", "-q", "-f", "qcow2", "disk", "1M")
	creds := certtest.NewCA(t).ServerDir()
	broken := t.TempDir()
	for _, tc := range []struct{ args, want string }{
		{"--socket-mode 888", "--socket-mode 888 is not a file mode such as 0660"},
		{"--socket-mode 0", "--socket-mode 0 is not a file mode such as 0660"},
		{"--max-connections-per-client -1", "--max-connections-per-client and --stall-timeout must not be negative"},
		{"--stall-timeout -1s", "--max-connections-per-client and --stall-timeout must not be negative"},
		{"--max-memory lots", "--max-memory lots is not a size"},
		{"--user no-such-user-here", `--user: user "no-such-user-here": `},
		{"--sandbox=maybe", "--sandbox=maybe: expecting strict or best-effort"},
		{"--allow-uid 0 --listen localhost", "rules about users and groups need a --socket"},
		{"--allow-uid nobody-like-this", "--allow-uid: rule uid:nobody-like-this: "},
		{"--allow-cn x", "rules about certificates need --tls-creds with --tls-verify-peer"},
		{"--allow-san x --tls-verify-peer=false --tls-creds " + creds, "rules about certificates need --tls-creds"},
		{"--export-allow x", "--export-allow x: expecting NAME=RULE[,RULE...]"},
		{"--export-allow =uid:0,", `--export-allow =uid:0,: rule "": `},
		{"--export-allow y=uid:0", `--export-allow: there is no export "y"`},
		{"--export-allow =cn:x", "rules about certificates need --tls-creds with --tls-verify-peer"},
		{"--tls-creds " + broken, "TLS credentials in \"" + broken + "\": server-cert.pem is missing"},
	} {
		args := append([]string{"serve", "--socket", "sock"}, strings.Fields(tc.args)...)
		if strings.Contains(tc.args, "--listen") {
			args = append([]string{"serve"}, strings.Fields(tc.args)...)
		}
		r := drover(t, append(args, "disk")...)
		if r.code != 1 || !strings.Contains(r.stderr, "drover: "+tc.want) {
			t.Errorf("%s: exit code %d, %q", tc.args, r.code, r.stderr)
		}
	}
	if _, err := os.Lstat("sock"); err == nil {
		t.Error("a socket was opened")
	}
}

// exportNames lists what a tool sees of a server.
func exportNames(t *testing.T, uri string) (string, error) {
	t.Helper()
	path, err := exec.LookPath("nbdinfo")
	if err != nil {
		t.Skip("nbdinfo is not installed: what clients see is not tested")
	}
	out, err := exec.Command(path, "--json", "--list", uri).Output()
	if err != nil {
		return "", err
	}
	var list struct {
		Exports []struct {
			Name string `json:"export-name"`
		} `json:"exports"`
	}
	if err := json.Unmarshal(out, &list); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	var names []string
	for _, e := range list.Exports {
		names = append(names, e.Name)
	}
	return strings.Join(names, " "), nil
}

// TestServeTLS has clients with different certificates see different exports.
func TestServeTLS(t *testing.T) {
	t.Chdir(t.TempDir())
	ca := certtest.NewCA(t)
	for _, name := range []string{"a", "b", "c"} {
		mustDrover(t, "create", "-q", "-f", "qcow2", name, "1M")
	}
	s := startServe(t, "--listen", "127.0.0.1:0", "--socket", "sock", "--socket-mode", "0640", "--tls-creds", ca.ServerDir(),
		"--allow-cn", "alice", "--allow-san", "bob.lan", "--export-allow", "b=cn:bob", "--export-allow", "b=cn:eve",
		"--export-allow", "c=uid:0", "--export", "a=a", "--export", "b=b", "--export", "c=c")
	socket, tcp := s.line(t), s.line(t)
	if !strings.HasPrefix(socket, "nbds+unix:///?socket=") || !strings.HasPrefix(tcp, "nbds://127.0.0.1:") {
		t.Errorf("addresses %q and %q", socket, tcp)
	}
	if st, err := os.Lstat("sock"); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("socket: %v, %v", st, err)
	}
	for range 3 {
		s.line(t)
	}
	port := tcp[strings.LastIndex(tcp, ":")+1:]
	sees := func(who *certtest.Names) (string, error) {
		return exportNames(t, "nbds://localhost:"+port+"/?tls-certificates="+ca.ClientDir(who))
	}
	for _, tc := range []struct {
		who  certtest.Names
		want string
	}{
		{certtest.Names{CommonName: "alice"}, "a"}, {certtest.Names{CommonName: "bob"}, "b"}, {certtest.Names{CommonName: "eve"}, "b"},
		{certtest.Names{CommonName: "bob", DNS: []string{"bob.lan"}}, "a b"}, {certtest.Names{CommonName: "mallory"}, ""},
	} {
		if got, err := sees(&tc.who); err != nil || got != tc.want {
			t.Errorf("%+v sees %q (%v), want %q", tc.who, got, err, tc.want)
		}
	}
	if got, err := exportNames(t, socket+"&tls-hostname=localhost&tls-certificates="+
		ca.ClientDir(&certtest.Names{CommonName: "x"})); os.Geteuid() == 0 && (err != nil || got != "c") {
		t.Errorf("root on the socket sees %q (%v), want c", got, err)
	}
	if got, err := sees(nil); err == nil {
		t.Errorf("a client without a certificate sees %q", got)
	}
	if got, err := exportNames(t, "nbd://localhost:"+port); err == nil {
		t.Errorf("a client in plain text sees %q", got)
	}
	signalSelf(t, syscall.SIGTERM)
	if code := s.end(t); code != 0 {
		t.Errorf("exit code %d, %s", code, &s.err)
	}
	if !strings.Contains(s.err.String(), "nbd: TLS: ") {
		t.Errorf("the failed handshake left no message: %q", &s.err)
	}
}

// TestServeSandbox serves a client from within the sandbox, as another user, and ends in order.
func TestServeSandbox(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can become somebody else")
	}
	io, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Skip("qemu-io is not installed")
	}
	dir := t.TempDir()
	program := filepath.Join(dir, "drover")
	build := exec.Command("go", "build", "-o", program, "github.com/droverproject/drover/cmd/drover")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	disk, sock := filepath.Join(dir, "disk"), filepath.Join(dir, "sock")
	mustDrover(t, "create", "-q", "-f", "qcow2", disk, "16M")
	messages := notifySocket(t)
	cmd := exec.Command(program, "serve", "--sandbox", "--user", "12345:23456", "--socket", sock, disk)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr lockedBuffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	lines := bufio.NewScanner(stdout)
	if !lines.Scan() { // it serves when it says where
		err := cmd.Wait()
		if strings.Contains(stderr.String(), "Landlock") {
			t.Skipf("the sandbox cannot be tried here: %s", &stderr)
		}
		t.Fatalf("%v: %s", err, &stderr)
	}
	for lines.Scan() && !strings.HasPrefix(lines.Text(), "export ") {
	}
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"Uid:\t12345\t12345\t12345\t12345", "Gid:\t23456\t23456\t23456\t23456", "Groups:\t23456", "NoNewPrivs:\t1",
		"CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("not %q in\n%s", want, status)
		}
	}
	if out, err := exec.Command(io, "-f", "raw", "nbd+unix:///?socket="+sock, "-c", "write -P 5 0 8M", "-c", "discard 1M 1M",
		"-c", "write -z 4M 1M", "-c", "flush", "-c", "read -P 5 0 1M", "-c", "read -P 0 4M 1M").CombinedOutput(); err != nil ||
		strings.Contains(string(out), "failed") {
		t.Errorf("%v: %s", err, out)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil || stderr.String() != "" {
			t.Errorf("%v: %s", err, &stderr)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the server does not end")
	}
	if a, b := <-messages, <-messages; a != "READY=1" || b != "STOPPING=1" {
		t.Errorf("the service manager was told %q and %q", a, b)
	}
	mustDrover(t, "check", "-q", disk)
	// The folder is root's, so the socket stays; the next server takes it over.
	if c, err := net.Dial("unix", sock); err == nil {
		c.Close()
		t.Error("somebody still listens")
	}
}
