package cli

import (
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			a.printVersion()
			return nil
		},
	}
}

func (a *app) printVersion() {
	a.printf("%s version %s (%s, %s/%s)\n", program, version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// version is that of the module, or of the commit it was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok || info.Main.Version == "" {
		return "(devel)"
	}
	return info.Main.Version
}

// standsFor is the version of QEMU's programs whose behaviour is drover's under their names.
const standsFor = "7.2.22"

// printStandIn prints the version under the name of another program: scripts read the number of the version that behaves
// like this, people what it is.
func (a *app) printStandIn() {
	a.printf("%s version %s (%s %s)\nCopyright (c) the drover authors\n", a.name, standsFor, program, version())
}
