// Command controlplane is etcd, kube-apiserver, kube-controller-manager and kube-scheduler in one static binary, for
// tests that need the real thing on one machine. The first argument says which of them to be; the rest are its flags.
package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllermanager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	"k8s.io/kubernetes/pkg/controller/job"
)

const usage = "usage: controlplane etcd|kube-apiserver|kube-controller-manager|kube-scheduler FLAG..."

func main() {
	if len(os.Args) < 2 {
		fail(usage)
	}
	name := os.Args[1]
	os.Args = append([]string{name}, os.Args[2:]...)
	var command *cobra.Command
	switch name {
	case "etcd":
		etcdmain.Main(os.Args)
		return
	case "kube-apiserver":
		command = apiserver.NewAPIServerCommand()
	case "kube-controller-manager":
		shortenJobDelays()
		command = controllermanager.NewControllerManagerCommand()
	case "kube-scheduler":
		command = scheduler.NewSchedulerCommand()
	default:
		fail(fmt.Sprintf("no program %q; %s", name, usage))
	}
	os.Exit(cli.Run(command))
}

// shortenJobDelays sets the waits between a Job's pods, for which the controller manager has no flag: at the 10 s that
// are built in, doubling, a test of five retries would take five minutes.
func shortenJobDelays() {
	set := func(variable string, target *time.Duration) {
		text, ok := os.LookupEnv(variable)
		if !ok {
			return
		}
		value, err := time.ParseDuration(text)
		if err != nil {
			fail(fmt.Sprintf("%s: %v", variable, err))
		}
		*target = value
	}
	set("JOB_POD_FAILURE_BACKOFF", &job.DefaultJobPodFailureBackOff)
	set("JOB_SYNC_BATCH_PERIOD", &job.SyncJobBatchPeriod)
}

func fail(message string) {
	fmt.Fprintln(os.Stderr, message)
	os.Exit(2)
}
