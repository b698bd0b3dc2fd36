package cli

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
)

func (a *app) tcmuCommand() *cobra.Command {
	t := scsiServer{app: a}
	cmd := &cobra.Command{
		Use:   "tcmu [flags]",
		Short: "Serve images as SCSI disks to the Linux target (LIO)",
		Long: `Serve images as SCSI disks through the TCM-User interface of the Linux target
(LIO), in place of tcmu-runner, until interrupted. What fabric the target uses
(iSCSI, Fibre Channel, vhost, loopback) and who may use a disk is set up with
targetcli as for every other backstore.

A disk's configuration string is its handler, a slash, the path of the image, and
options, each after a semicolon:

  qcow2//images/a.qcow2
  qcow//images/a.qcow2;l2-cache-size=64M
  qcow2//images/a.qcow2;read-only
  qcow2//images/a.qcow2;snapshot=before
  qcow2//images/a.qcow2;encrypt.key-secret=ID
  raw//images/b.img

The handlers qcow and qcow2 are the same. Options are the runtime options of QCOW2
images, read-only, and snapshot=NAME. Each image is locked while it is a disk. The
key of an encrypted one is only named: --secrets-dir or --object has it.

While the server runs, 'drover ctl' manages the disks: snapshots, sizes, bitmaps.
SIGHUP has it read its secrets and the log level of --config again.

SIGINT and SIGTERM end the server when every command under way has been answered
and everything is flushed; initiators find the disks busy until the next server
starts. A second signal ends it at once.`,
		Example: `  drover tcmu
  targetcli /backstores/user:qcow2 create disk0 20G /images/disk0.qcow2
  drover tcmu --allow-path /templates --log-level debug`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return t.run(cmd) },
	}
	f := cmd.Flags()
	f.BoolVarP(&t.readOnly, "read-only", "r", false, "let initiators change nothing")
	f.StringVar(&t.cacheSize, "cache-size", "", "`size` of the metadata caches of all images together (default 256M)")
	f.BoolVar(&t.answerOthers, "answer-others", true, "refuse disks of handlers that are not here, lest enabling them wait for ever")
	f.StringVar(&t.journalDir, "journal-dir", block.DefaultJournalDir,
		"`folder` on a tmpfs for the journals by which nothing acknowledged is lost if drover is killed; none: flush instead, slowly")
	f.BoolVar(&t.writeBack, "write-back", false, "keep no journal: allocating writes since the last flush are lost if drover is killed")
	f.StringVar(&t.bus, "dbus", "system", "offer the D-Bus service on the `BUS`: system, session, an address, or none")
	t.manage.add(f, defaultControl, defaultTCMUConfig)
	t.objects.add(f)
	f.StringVar(&t.secretsDir, "secrets-dir", "", "find the secrets that configurations name in `DIR`, a file for each, called by its ID")
	t.policy.add(f)
	return cmd
}

// defaultTCMUConfig is read if it is there.
const defaultTCMUConfig = "/etc/drover/tcmu.conf"

// scsiServer is one run of tcmu.
type scsiServer struct {
	*app
	readOnly, answerOthers, writeBack bool
	cacheSize, bus, secretsDir        string
	objects                           objectFlags
	journalDir                        string
	policy                            policyFlags
	manage                            manageFlags
	*manager
}

func (t *scsiServer) run(cmd *cobra.Command) error {
	c, err := t.config()
	if err != nil {
		return err
	}
	ctx, signals := catchSignals(cmd.Context())
	defer signals.release()
	t.connect()
	defer t.notifier.Close()
	defer t.onHangup()()
	if c.Bus, err = daemon.OpenTCMUBus(t.bus, c.Log); err != nil {
		return err
	}
	defer c.Bus.Close()
	if c.Control, err = t.openControl(ctx); err != nil {
		return err
	}
	defer c.Control.Close()
	done := make(chan error, 1)
	go func() { done <- daemon.ServeTCMU(ctx, c, func() { t.notify(stateReady) }) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	t.notify(stateStopping)
	select {
	case err := <-done:
		return err
	case <-signals.second:
		return &exitError{exitForced, "ended by a second signal; writes that were not flushed may be lost"}
	}
}

func (t *scsiServer) config() (daemon.TCMUConfig, error) {
	var err error
	if t.manager, err = t.manage.start(); err != nil { // first: it may set the other flags
		return daemon.TCMUConfig{}, err
	}
	t.log = slog.New(slog.NewTextHandler(t.err, &slog.HandlerOptions{Level: t.level}))
	c := daemon.TCMUConfig{Log: t.log, Policy: t.policy.policy(), ReadOnly: t.readOnly, AnswerOthers: t.answerOthers, WriteBack: t.writeBack,
		JournalDir: t.journalDir, NoJournal: t.journalDir == "none"}
	if c.NoJournal {
		c.JournalDir = ""
	}
	keys, err := newKeyring(&t.objects, t.secretsDir)
	if err != nil {
		return c, err
	}
	t.reloads = append(t.reloads, keys.reload)
	c.Secret = keys.lookup
	if t.cacheSize != "" {
		n, err := block.ParseSize(t.cacheSize)
		if err != nil || n <= 0 {
			return c, usagef("--cache-size %s is not a size", t.cacheSize)
		}
		c.Memory = n
	}
	return c, nil
}

// openControl opens the control socket. Its folder may be missing where no service manager made it.
func (t *scsiServer) openControl(ctx context.Context) (*daemon.Control, error) {
	if t.manage.control == defaultControl {
		if err := os.MkdirAll(filepath.Dir(defaultControl), 0o755); err != nil {
			return nil, err
		}
	}
	return t.open(ctx, nil)
}
