package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/godbus/dbus/v5"
	"github.com/godbus/dbus/v5/introspect"
	"github.com/godbus/dbus/v5/prop"
)

// Names of tcmu-runner's D-Bus interface, which targetcli asks what kinds of disks there are.
const (
	busName        = "org.kernel.TCMUService1"
	busPath        = dbus.ObjectPath("/org/kernel/TCMUService1")
	busManager     = busName + ".HandlerManager1"
	busManagerPath = busPath + "/HandlerManager1"

	dbusProperties    = "org.freedesktop.DBus.Properties"
	dbusObjectManager = "org.freedesktop.DBus.ObjectManager"
	dbusIntrospection = "org.freedesktop.DBus.Introspectable"
	dbusOwnerChanged  = "org.freedesktop.DBus.NameOwnerChanged"
)

// tcmuDescriptions are what targetcli shows of a handler.
func tcmuDescription(name string) string {
	if tcmuFormats[name] == "qcow2" {
		return "The path of a QCOW2 image, then options, each after a semicolon: read-only, snapshot=NAME, encrypt.key-secret=ID, or a" +
			" runtime option such as l2-cache-size=64M."
	}
	return "The path of a raw image, then options, each after a semicolon: read-only."
}

// TCMUBus is the D-Bus service through which targetcli finds the handlers.
type TCMUBus struct {
	conn *dbus.Conn
	log  *slog.Logger
	// probe opens the image of a configuration and closes it again, and says why it cannot; nil: nobody tries.
	probe func(config string) error

	mu       sync.Mutex
	external map[string]externalHandler // by subtype
}

// externalHandler is a handler that another process has registered. It serves its devices itself.
type externalHandler struct{ description, owner string }

// OpenTCMUBus connects to a bus: "system", "session", an address, or "none". A host without a system bus is no error: disks
// can be set up without.
func OpenTCMUBus(which string, log *slog.Logger) (*TCMUBus, error) {
	var conn *dbus.Conn
	var err error
	switch which {
	case "none", "":
		return nil, nil
	case "system":
		if conn, err = dbus.ConnectSystemBus(); err != nil {
			log.Warn("no D-Bus service, so targetcli will not list the handlers", "reason", err)
			return nil, nil
		}
	case "session":
		conn, err = dbus.ConnectSessionBus()
	default:
		conn, err = dbus.Connect(which)
	}
	if err != nil {
		return nil, fmt.Errorf("connecting to D-Bus (%s): %w", which, err)
	}
	return &TCMUBus{conn: conn, log: log, external: make(map[string]externalHandler)}, nil
}

// Close leaves the bus.
func (b *TCMUBus) Close() error {
	if b == nil {
		return nil
	}
	return b.conn.Close()
}

// Serve offers the service.
func (b *TCMUBus) Serve() error {
	if err := b.export(); err != nil {
		return fmt.Errorf("offering the D-Bus service: %w", err)
	}
	if err := b.watch(); err != nil {
		return fmt.Errorf("watching for handlers that leave the bus: %w", err)
	}
	got, err := b.conn.RequestName(busName, dbus.NameFlagDoNotQueue)
	if err != nil {
		return fmt.Errorf("taking the D-Bus name %s: %w", busName, err)
	}
	if got != dbus.RequestNameReplyPrimaryOwner {
		return fmt.Errorf("the D-Bus name %s is taken: is tcmu-runner running, or another drover?", busName)
	}
	return nil
}

func (b *TCMUBus) export() error {
	root := map[string]any{"GetManagedObjects": b.managedObjects}
	if err := b.conn.ExportMethodTable(root, busPath, dbusObjectManager); err != nil {
		return err
	}
	manager := map[string]any{"RegisterHandler": b.register}
	if err := b.conn.ExportMethodTable(manager, busManagerPath, busManager); err != nil {
		return err
	}
	for name := range tcmuFormats {
		check := func(sender dbus.Sender, config string) (bool, string, *dbus.Error) {
			ok, why := b.checkConfig(sender, name, config)
			return ok, why, nil
		}
		if err := b.exportHandler(name, tcmuDescription(name), check); err != nil {
			return err
		}
	}
	return b.describe()
}

// describe answers introspection for the objects above the handlers.
func (b *TCMUBus) describe() error {
	children := []introspect.Node{{Name: "HandlerManager1"}}
	for _, name := range slices.Sorted(maps.Keys(tcmuFormats)) {
		children = append(children, introspect.Node{Name: name})
	}
	root := &introspect.Node{Name: string(busPath), Children: children, Interfaces: []introspect.Interface{
		introspect.IntrospectData, {Name: dbusObjectManager, Methods: []introspect.Method{{
			Name: "GetManagedObjects", Args: []introspect.Arg{{Name: "objects", Type: "a{oa{sa{sv}}}", Direction: "out"}},
		}}},
	}}
	if err := b.introspectable(root, busPath); err != nil {
		return err
	}
	manager := &introspect.Node{Name: string(busManagerPath), Interfaces: []introspect.Interface{
		introspect.IntrospectData, {Name: busManager, Methods: []introspect.Method{{
			Name: "RegisterHandler", Args: []introspect.Arg{
				{Name: "subtype", Type: "s", Direction: "in"}, {Name: "cfgstr_desc", Type: "s", Direction: "in"},
				{Name: "succeeded", Type: "b", Direction: "out"}, {Name: "message", Type: "s", Direction: "out"},
			},
		}}},
	}}
	return b.introspectable(manager, busManagerPath)
}

// introspectable lets an object be asked what it has. The method is named here, as all others are, and not found by
// dbus.Conn.Export: looking for methods by reflection would keep every method of the whole program in the binary.
func (b *TCMUBus) introspectable(node *introspect.Node, path dbus.ObjectPath) error {
	methods := map[string]any{"Introspect": introspect.NewIntrospectable(node).Introspect}
	return b.conn.ExportMethodTable(methods, path, dbusIntrospection)
}

// constant is an object's only property, which never changes: prop.Export, which looks for methods by reflection, is for more.
type constant struct {
	iface, name string
	value       prop.Prop
}

func (c constant) methods() map[string]any {
	return map[string]any{"Get": c.get, "GetAll": c.getAll, "Set": c.set}
}

func (c constant) get(iface, name string) (dbus.Variant, *dbus.Error) {
	if err := c.known(iface, name); err != nil {
		return dbus.Variant{}, err
	}
	return dbus.MakeVariant(c.value.Value), nil
}

func (c constant) getAll(iface string) (map[string]dbus.Variant, *dbus.Error) {
	if err := c.known(iface, c.name); err != nil {
		return nil, err
	}
	return map[string]dbus.Variant{c.name: dbus.MakeVariant(c.value.Value)}, nil
}

func (c constant) set(iface, name string, _ dbus.Variant) *dbus.Error {
	if err := c.known(iface, name); err != nil {
		return err
	}
	return prop.ErrReadOnly
}

func (c constant) known(iface, name string) *dbus.Error {
	if iface != c.iface {
		return prop.ErrIfaceNotFound
	}
	if name != c.name {
		return prop.ErrPropNotFound
	}
	return nil
}

// checkConfig is CheckConfig of one of our handlers. Who may read every image anyway is told whether this one can be opened.
func (b *TCMUBus) checkConfig(sender dbus.Sender, handler, config string) (bool, string) {
	ok, why := checkFor(handler, config)
	if !ok || b.probe == nil || !b.privileged(sender) {
		return ok, why
	}
	if err := b.probe(config); err != nil {
		return false, strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return true, "success"
}

// privileged reports whether a caller is root, or the user of this process.
func (b *TCMUBus) privileged(sender dbus.Sender) bool {
	var uid uint32
	err := b.conn.BusObject().Call("org.freedesktop.DBus.GetConnectionUnixUser", 0, string(sender)).Store(&uid)
	return err == nil && (uid == 0 || uid == uint32(os.Geteuid()))
}

// checkFor is CheckConfig of one handler. It tells of the syntax and never whether a file exists: anybody may ask.
func checkFor(handler, config string) (bool, string) {
	if name, _, _ := strings.Cut(config, "/"); name != handler {
		return false, fmt.Sprintf("configuration %q does not begin with %q", config, handler+"/")
	}
	if err := CheckTCMUConfig(config); err != nil {
		return false, err.Error()
	}
	return true, "success (the syntax is right; the image is looked at when the disk is enabled)"
}

func handlerPath(name string) dbus.ObjectPath { return busPath + "/" + dbus.ObjectPath(name) }

// exportHandler offers the object of one handler, whose CheckConfig is check.
func (b *TCMUBus) exportHandler(name, description string, check any) error {
	path := handlerPath(name)
	methods := map[string]any{
		"CheckConfig": check,
		"ChangeMedium": func(string, uint64, string) (int32, string, *dbus.Error) {
			return 1, "disks keep their medium", nil
		},
	}
	if err := b.conn.ExportMethodTable(methods, path, busName); err != nil {
		return err
	}
	desc := prop.Prop{Value: description, Emit: prop.EmitConst}
	if err := b.conn.ExportMethodTable(constant{busName, "ConfigDesc", desc}.methods(), path, dbusProperties); err != nil {
		return err
	}
	in := func(name, kind string) introspect.Arg { return introspect.Arg{Name: name, Type: kind, Direction: "in"} }
	out := func(name, kind string) introspect.Arg {
		return introspect.Arg{Name: name, Type: kind, Direction: "out"}
	}
	node := &introspect.Node{Name: string(path), Interfaces: []introspect.Interface{
		introspect.IntrospectData, prop.IntrospectData, {
			Name: busName, Properties: []introspect.Property{desc.Introspection("ConfigDesc")}, Methods: []introspect.Method{
				{Name: "CheckConfig", Args: []introspect.Arg{in("configstr", "s"), out("is_valid", "b"), out("message", "s")}},
				{Name: "ChangeMedium", Args: []introspect.Arg{
					in("name", "s"), in("size", "t"), in("configstr", "s"), out("ret", "i"), out("message", "s"),
				}},
			},
		},
	}}
	return b.introspectable(node, path)
}

// hideHandler takes the object of a handler away.
func (b *TCMUBus) hideHandler(name string) error {
	path := handlerPath(name)
	return errors.Join(b.conn.ExportMethodTable(nil, path, busName), b.conn.ExportMethodTable(nil, path, dbusProperties),
		b.conn.ExportMethodTable(nil, path, dbusIntrospection))
}

type managedObject = map[string]map[string]dbus.Variant

func handlerObject(description string) managedObject {
	return managedObject{busName: {"ConfigDesc": dbus.MakeVariant(description)}}
}

func (b *TCMUBus) managedObjects() (map[dbus.ObjectPath]managedObject, *dbus.Error) {
	objects := make(map[dbus.ObjectPath]managedObject)
	for name := range tcmuFormats {
		objects[handlerPath(name)] = handlerObject(tcmuDescription(name))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for name, h := range b.external {
		objects[handlerPath(name)] = handlerObject(h.description)
	}
	return objects, nil
}

// subtypes are names that can stand in an object path and in a bus name.
var subtypes = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,63}$`) })

// maxExternal bounds the handlers of other processes: anybody on the bus may register.
const maxExternal = 64

// register takes in a handler of another process, which owns the name of the handler on the bus: that is what the bus's
// policy lets some processes do and others not.
func (b *TCMUBus) register(sender dbus.Sender, subtype, description string) (bool, string, *dbus.Error) {
	if !subtypes().MatchString(subtype) || subtype == "HandlerManager1" {
		return false, fmt.Sprintf("%q is no name of a handler", subtype), nil
	}
	if len(description) > 4096 {
		return false, "the description is too long", nil
	}
	name := busManager + "." + subtype
	var owner string
	err := b.conn.BusObject().Call("org.freedesktop.DBus.GetNameOwner", 0, name).Store(&owner)
	if err != nil || owner != string(sender) {
		return false, fmt.Sprintf("whoever registers %q has to own the name %s", subtype, name), nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	_, taken := b.external[subtype]
	if _, ours := tcmuFormats[subtype]; ours || taken {
		return false, fmt.Sprintf("there is a handler %q", subtype), nil
	}
	if len(b.external) >= maxExternal {
		return false, "there are too many handlers", nil
	}
	there := b.conn.Object(name, busManagerPath+"/"+dbus.ObjectPath(subtype))
	check := func(config string) (valid bool, message string, failed *dbus.Error) {
		if err := there.Call(busName+".CheckConfig", 0, config).Store(&valid, &message); err != nil {
			return false, "", dbus.MakeFailedError(fmt.Errorf("asking the handler: %w", err))
		}
		return valid, message, nil
	}
	if err := b.exportHandler(subtype, description, check); err != nil {
		return false, err.Error(), nil
	}
	b.external[subtype] = externalHandler{description, owner}
	b.emit("InterfacesAdded", handlerPath(subtype), handlerObject(description))
	b.log.Info("handler registered on the bus; its process serves its devices", "handler", subtype)
	return true, "success", nil
}

func (b *TCMUBus) emit(signal string, args ...any) {
	if err := b.conn.Emit(busPath, dbusObjectManager+"."+signal, args...); err != nil {
		b.log.Warn("D-Bus", "signal", signal, "error", err)
	}
}

// watch forgets handlers whose process gives up their name.
func (b *TCMUBus) watch() error {
	err := b.conn.AddMatchSignal(dbus.WithMatchInterface("org.freedesktop.DBus"), dbus.WithMatchMember("NameOwnerChanged"),
		dbus.WithMatchArg0Namespace(busManager))
	if err != nil {
		return err
	}
	signals := make(chan *dbus.Signal, 16)
	b.conn.Signal(signals)
	go func() {
		for s := range signals { // until the connection is closed
			if s.Name != dbusOwnerChanged || len(s.Body) != 3 {
				continue
			}
			name, _ := s.Body[0].(string)
			owner, _ := s.Body[2].(string)
			if subtype, ok := strings.CutPrefix(name, busManager+"."); ok {
				b.left(subtype, owner)
			}
		}
	}()
	return nil
}

// left forgets a handler unless its name still has the owner that registered it.
func (b *TCMUBus) left(subtype, owner string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	h, ok := b.external[subtype]
	if !ok || h.owner == owner {
		return
	}
	delete(b.external, subtype)
	if err := b.hideHandler(subtype); err != nil {
		b.log.Warn("D-Bus", "handler", subtype, "error", err)
	}
	b.emit("InterfacesRemoved", handlerPath(subtype), []string{busName})
	b.log.Info("handler left the bus", "handler", subtype)
}
