package daemon

import (
	"bufio"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// privateBus starts a bus of its own for the test and returns its address.
func privateBus(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("dbus-daemon is not installed (package dbus)")
	}
	cmd := exec.Command("dbus-daemon", "--session", "--nofork", "--nopidfile", "--print-address",
		"--address=unix:path="+filepath.Join(t.TempDir(), "bus"))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the bus did not say its address: %v", err)
	}
	return strings.TrimSpace(address)
}

func serveBus(t *testing.T) (address string) {
	t.Helper()
	address = privateBus(t)
	b, err := OpenTCMUBus(address, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	if err := b.Serve(); err != nil {
		t.Fatal(err)
	}
	return address
}

// send calls a method with the stock client.
func send(t *testing.T, address string, path dbus.ObjectPath, method string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("dbus-send"); err != nil {
		t.Skip("dbus-send is not installed (package dbus)")
	}
	list := append([]string{"--bus=" + address, "--print-reply", "--dest=" + busName, string(path), method}, args...)
	out, err := exec.Command("dbus-send", list...).CombinedOutput()
	if err != nil {
		t.Fatalf("dbus-send %v: %v\n%s", list, err, out)
	}
	return strings.Join(strings.Fields(string(out)), " ")
}

// TestBusObjects asks what targetcli asks, with a stock client.
func TestBusObjects(t *testing.T) {
	address := serveBus(t)
	got := send(t, address, busPath, dbusObjectManager+".GetManagedObjects")
	for _, name := range []string{"qcow", "qcow2", "raw"} {
		if !strings.Contains(got, fmt.Sprintf(`object path "/org/kernel/TCMUService1/%s"`, name)) {
			t.Errorf("%s is not among the objects: %s", name, got)
		}
	}
	if !strings.Contains(got, `string "org.kernel.TCMUService1"`) || !strings.Contains(got, `string "ConfigDesc"`) {
		t.Errorf("interface or property missing: %s", got)
	}
	got = send(t, address, busPath+"/qcow", dbusProperties+".Get", "string:"+busName, "string:ConfigDesc")
	if !strings.Contains(got, "QCOW2 image") {
		t.Errorf("ConfigDesc: %s", got)
	}
	for path, want := range map[dbus.ObjectPath]string{
		busPath: "GetManagedObjects", busPath + "/qcow": "CheckConfig", busManagerPath: "RegisterHandler",
	} {
		if got := send(t, address, path, dbusIntrospection+".Introspect"); !strings.Contains(got, want) {
			t.Errorf("introspection of %s: %s", path, got)
		}
	}
}

// TestBusCheckConfig judges configurations. What exists on the host must make no difference.
func TestBusCheckConfig(t *testing.T) {
	address := serveBus(t)
	check := func(handler, config string) string {
		return send(t, address, handlerPath(handler), busName+".CheckConfig", "string:"+config)
	}
	existing, err := filepath.Abs("tcmu_linux.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{existing, "/no/such/file"} {
		if got := check("qcow", "qcow/"+file); !strings.Contains(got, `boolean true string "success (the syntax`) {
			t.Errorf("%s: %s", file, got)
		}
	}
	for config, want := range map[string]string{
		"qcow//a;l2-cache-size=64M;read-only;snapshot=before": "boolean true",
		"qcow//a;l2-cache-size":                               "boolean false",
		"qcow//a;nonsense=1":                                  "boolean false",
		"qcow/a":                                              "boolean false",
		"qcow":                                                "boolean false",
		"qcow2//a":                                            "boolean false", // another handler's
	} {
		if got := check("qcow", config); !strings.Contains(got, want) {
			t.Errorf("%s: %s", config, got)
		}
	}
}

// TestBusExternalHandler has another process's handler registered, asked, and forgotten when its name goes.
func TestBusExternalHandler(t *testing.T) {
	address := serveBus(t)
	conn, err := dbus.Connect(address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	register := func(subtype string) (ok bool, message string) {
		t.Helper()
		err := conn.Object(busName, busManagerPath).Call(busManager+".RegisterHandler", 0, subtype, "a handler").Store(&ok, &message)
		if err != nil {
			t.Fatal(err)
		}
		return ok, message
	}
	if ok, message := register("tape"); ok || !strings.Contains(message, "own the name") {
		t.Errorf("registered without the name: %v %q", ok, message)
	}
	for _, subtype := range []string{"", "a/b", "HandlerManager1", "9"} {
		if ok, _ := register(subtype); ok {
			t.Errorf("registered %q", subtype)
		}
	}
	own := func(name string) {
		t.Helper()
		if got, err := conn.RequestName(busManager+"."+name, dbus.NameFlagDoNotQueue); err != nil || got != dbus.RequestNameReplyPrimaryOwner {
			t.Fatalf("%v %v", got, err)
		}
	}
	own("tape")
	own("qcow")
	methods := map[string]any{"CheckConfig": func(config string) (bool, string, *dbus.Error) { return config == "tape/good", "said tape", nil }}
	if err := conn.ExportMethodTable(methods, busManagerPath+"/tape", busName); err != nil {
		t.Fatal(err)
	}
	if ok, message := register("tape"); !ok {
		t.Fatalf("not registered: %s", message)
	}
	if ok, _ := register("tape"); ok {
		t.Error("registered twice")
	}
	if ok, _ := register("qcow"); ok {
		t.Error("one of our own registered over")
	}
	if got := send(t, address, busPath, dbusObjectManager+".GetManagedObjects"); !strings.Contains(got, "/org/kernel/TCMUService1/tape") {
		t.Errorf("not among the objects: %s", got)
	}
	for config, want := range map[string]string{"tape/good": "boolean true", "tape/bad": "boolean false"} {
		if got := send(t, address, handlerPath("tape"), busName+".CheckConfig", "string:"+config); !strings.Contains(got, want+` string "said tape"`) {
			t.Errorf("%s: %s", config, got)
		}
	}
	if err := conn.AddMatchSignal(dbus.WithMatchInterface(dbusObjectManager), dbus.WithMatchMember("InterfacesRemoved")); err != nil {
		t.Fatal(err)
	}
	signals := make(chan *dbus.Signal, 4)
	conn.Signal(signals)
	if _, err := conn.ReleaseName(busManager + ".tape"); err != nil {
		t.Fatal(err)
	}
	expired := time.After(time.Minute) // only a failure gets there
	for gone := false; !gone; {
		select {
		case s := <-signals:
			gone = s.Name == dbusObjectManager+".InterfacesRemoved"
		case <-expired:
			t.Fatal("no signal that the handler is gone")
		}
	}
	if got := send(t, address, busPath, dbusObjectManager+".GetManagedObjects"); strings.Contains(got, "TCMUService1/tape") {
		t.Errorf("still among the objects: %s", got)
	}
}

// TestBusNameTaken: two services cannot be on one bus.
func TestBusNameTaken(t *testing.T) {
	address := serveBus(t)
	b, err := OpenTCMUBus(address, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Serve(); err == nil || !strings.Contains(err.Error(), "tcmu-runner") {
		t.Errorf("a second service: %v", err)
	}
}
